"""Packed micro-batches through Megatron's pipeline schedules to token statistics. PP and CP end here.

The last stage gives hidden states. Those at the positions that predict a response token are chosen, and only those are
multiplied by the output layer:

    hidden [S, 1, D] or [S/TP, 1, D]  ->  hidden [T, D]  ->  logits [T, V/TP]  ->  statistics [T]

Under context parallelism a rank reads and predicts its own tokens of each sequence, and has the statistics of all at
the end (context.py).

Where the micro-batch says what the sampler kept of the vocabulary, the log-prob is that of the policy renormalised on
it.

``forward`` runs without gradient; ``forward_backward`` adds the loss's gradient into Megatron's buffers.
Both return the statistics of each micro-batch on the last pipeline stage and None on the others.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol, Self, TypeVar

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region
from torch import Tensor

from megatron_ext import cpu_compat, heartbeat
from megatron_ext.methods.base import Needs
from megatron_ext.model import context, groups, layers
from megatron_ext.model.build import Policy
from megatron_ext.model.supports import logits_in_parts, support_of
from megatron_ext.ops import linear_policy_stats, policy_stats
from megatron_ext.ops.shard import VocabShard
from megatron_ext.types import OF_MIN_P, PackedSequences, TokenStats

LossFunction = Callable[[int, TokenStats], Tensor]  # (number of the micro-batch, statistics) -> scalar


class Detachable(Protocol):
    """What is read from the last stage's output: statistics, or a tensor."""

    def detach(self) -> Self: ...


Found = TypeVar("Found", bound=Detachable)


def forward(
    policy: Policy, packed: Sequence[PackedSequences], needs: Needs, temperature: float
) -> list[TokenStats] | None:
    """Statistics without gradient of every micro-batch."""
    with torch.no_grad():
        return run_pipeline(policy, packed, _statistics(policy, needs, temperature, with_grad=False), loss=None)


def forward_backward(
    policy: Policy, packed: Sequence[PackedSequences], needs: Needs, temperature: float, loss: LossFunction
) -> list[TokenStats] | None:
    """Run the micro-batches with gradient. ``loss`` is called once per micro-batch on the last stage.

    Afterwards the gradient of the sum of all losses over micro-batches and data-parallel ranks is in the
    distributed optimizer's buffers. Context-parallel ranks have the same loss, which counts once.
    """
    return run_pipeline(policy, packed, _statistics(policy, needs, temperature, with_grad=True), loss)


def run_pipeline(
    policy: Policy,
    packed: Sequence[PackedSequences],
    read: Callable[[Tensor, PackedSequences], Found],
    loss: Callable[[int, Found], Tensor] | None,
) -> list[Found] | None:
    """What ``read`` finds in the last stage's output of each micro-batch; with a loss, its gradient too."""

    def step(numbered, model):
        heartbeat.progress()
        number, micro_batch = next(numbered)
        tokens = micro_batch.tokens.to(cpu_compat.device())[None]
        with cpu_compat.as_it_is(), _replayed(policy, model, micro_batch, with_grad=loss is not None):
            output = model(
                input_ids=tokens,
                position_ids=micro_batch.position.to(cpu_compat.device())[None],
                attention_mask=None,
                packed_seq_params=_packed_params(micro_batch),
            )

        def finish(output: Tensor):
            with cpu_compat.as_it_is():
                found = read(output, micro_batch)
                total = torch.zeros(()) if loss is None else loss(number, found)
            return total, torch.tensor(0, dtype=torch.int), found.detach()

        return output, finish

    if policy.routing is not None:
        policy.routing.begin_pass()
    results = get_forward_backward_func()(
        forward_step_func=step,
        data_iterator=[iter(enumerate(packed)) for _ in policy.chunks],
        model=policy.chunks,
        num_microbatches=len(packed),
        seq_length=1,  # the true lengths travel with the tensors (variable_seq_lengths)
        micro_batch_size=1,
        forward_only=loss is None,
    )
    return results if groups.is_last_stage() else None


def _statistics(
    policy: Policy, needs: Needs, temperature: float, *, with_grad: bool
) -> Callable[[Tensor, PackedSequences], TokenStats]:
    """Reads token statistics from hidden states, through the output layer or the fused head."""
    shard = policy.vocab_shard

    def read(output: Tensor, micro_batch: PackedSequences) -> TokenStats:
        hidden, targets = select_hidden(policy, output, micro_batch), micro_batch.targets.to(output.device)
        logits = None if policy.fused_head else logits_of(policy, hidden)
        parts = logits_in_parts(policy, hidden) if logits is None else [logits.detach()]
        support = support_of(micro_batch, policy, parts, temperature, output.device)
        want, grad = _outputs(needs, logprob="logprob" if support is None else "support_logprob")
        by_probability = needs.min_p is not None
        options: Any = {"temperature": temperature, "top_p": needs.nucleus_p, "min_p": needs.min_p}
        options |= {"nucleus": "exclusive" if by_probability else needs.nucleus}
        options |= {"want": want, "grad": grad if with_grad else (), "support": support}
        options |= {"deterministic": policy.deterministic}
        if logits is None:
            weight: Any = policy.head_weight
            if with_grad:  # Megatron's buffer takes the gradient as it is made, not a second time from autograd
                weight.grad_added_to_main_grad = True
            main_grad = weight.main_grad if with_grad else None
            found = linear_policy_stats(hidden, weight, targets, shard, main_grad=main_grad, **options)
        else:  # nobody else reads these logits: the backward writes their gradient over them
            found = policy_stats(logits, targets, shard, inplace_backward=with_grad, **options)
        logprob, *others = want
        fields = OF_MIN_P if by_probability else {}
        values = {fields.get(name, name): found[name] for name in others}
        own = TokenStats(found[logprob], **values, **_of_support(micro_batch, shard, output.device))
        return own.map(lambda value: context.whole(value, micro_batch.context))

    return read


def _of_support(micro_batch: PackedSequences, shard: VocabShard, device: torch.device) -> dict[str, Tensor]:
    """The statistics of what the sampler kept, fp32 ``[T]``."""
    if (support := micro_batch.support) is None:
        return {}
    sizes = torch.from_numpy(support.kept.sizes)
    values = {
        "support_size": torch.where(sizes > 0, sizes, shard.vocab_size),
        "outside_support": torch.from_numpy(support.outside),
    }
    return {name: value.to(device, torch.float32) for name, value in values.items()}


def logits_of(policy: Policy, hidden: Tensor) -> Tensor:
    """``[T, D] -> [T, V/TP]``: Megatron's own product, whose backward sums the gradient over the ranks."""
    weight = policy.head_weight if policy.architecture.tied else None
    logits, _ = policy.modules[-1].output_layer(hidden, weight=weight)
    return logits


def select_hidden(policy: Policy, output: Tensor, micro_batch: PackedSequences) -> Tensor:
    """``[S, 1, D]``, with sequence parallelism ``[S/TP, 1, D]``, to those that predict a response token, ``[T, D]``.

    What follows must hand back the full gradient on every tensor-parallel rank: backward only takes
    this rank's tokens.
    """
    if policy.modules[-1].config.sequence_parallel:
        output = gather_from_sequence_parallel_region(output, tensor_parallel_output_grad=False)
    return output[:, 0].index_select(0, micro_batch.logit_positions.to(output.device))


def _outputs(needs: Needs, *, logprob: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
    want, grad = [logprob], [logprob]
    if needs.entropy:
        want.append("entropy")
    if needs.entropy and needs.entropy_grad:
        grad.append("entropy")
    if needs.nucleus_p is not None:
        want += ["nucleus_entropy", "nucleus_mass", "nucleus_size"]
    if needs.nucleus_p is not None and needs.nucleus_grad:
        grad.append("nucleus_entropy")
    if needs.min_p is not None:
        want += OF_MIN_P
    if needs.min_p is not None and needs.min_p_grad:
        grad.append("nucleus_mass")
    return tuple(want), tuple(grad)


def _replayed(
    policy: Policy, model: Any, micro_batch: PackedSequences, *, with_grad: bool
) -> AbstractContextManager[None]:
    """Within, the routers of the chunk ``model`` take the experts of the micro-batch's tokens, if the policy is to."""
    if policy.routing is None:
        return nullcontext()
    return policy.routing.replayed(policy.chunks.index(model), micro_batch, with_grad=with_grad)


def _packed_params(micro_batch: PackedSequences) -> PackedSeqParams:
    starts = micro_batch.starts.to(cpu_compat.device())
    of_whole = micro_batch.position + 1 if micro_batch.context is None else micro_batch.starts.diff()
    longest = int(of_whole.max())
    params = PackedSeqParams(
        qkv_format="thd",
        cu_seqlens_q=starts,
        cu_seqlens_kv=starts,
        max_seqlen_q=longest,
        max_seqlen_kv=longest,
    )
    if micro_batch.branch is not None:
        layers.share_prompts(params, micro_batch.position, micro_batch.branch)
    if micro_batch.context is not None:
        layers.cut_over_context(params, micro_batch.position)
    return params
