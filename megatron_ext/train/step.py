"""One training step: episodes in, updated policy and metrics out.

old     = statistics of the policy that sampled, over the whole step        (no gradient; not by a pass of its own
                                                                            where the only update can measure them)
value   = the critic's values, where the method has one                     (no gradient)
batch   = method.credit(step, value)                                        advantages, returns
method.observe(batch, old)                                                  anchors, controllers
for each mini-batch, where there is a critic: its update                    (critic.py)
for each mini-batch, unless the method leaves the policy alone in this step:
    current = old while the policy has not moved, else a pass without gradient (if the method asks)
    plan    = method.prepare(mini-batch, current)                          whole-mini-batch statistics
    for each micro-batch: backward of sum(method.loss(micro-batch, statistics, plan))
    clip, AdamW step
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from megatron_ext import cpu_compat
from megatron_ext.config.schema import Config
from megatron_ext.methods.base import Method, Needs, Prepared, Reducer, num_valid
from megatron_ext.metrics.display import Watch
from megatron_ext.metrics.step_metrics import summarise
from megatron_ext.model import parallel
from megatron_ext.model.build import Policy
from megatron_ext.model.forward import forward, forward_backward
from megatron_ext.model.reference import Reference
from megatron_ext.model.trainable import TrainableModel, totals
from megatron_ext.train import critic, mismatch, packing
from megatron_ext.train.packing import MicroBatches
from megatron_ext.train.token_weights import token_weights
from megatron_ext.types import Batch, Episode, TokenStats

NUCLEUS_P = 0.8  # of the reported nucleus where the method has none


@dataclass
class Learner:
    """The policy and the critic with what changes them. ``step`` is the training step of the module's docstring."""

    config: Config
    method: Method
    actor: TrainableModel
    critic: TrainableModel | None = None
    reference: Reference | None = None
    reduce: Reducer = field(default_factory=parallel.DataReducer)

    @property
    def policy(self) -> Policy:
        return self.actor.model

    @property
    def trained(self) -> dict[str, TrainableModel]:
        """All models that train, by name."""
        return {"policy": self.actor} | ({} if self.critic is None else {"critic": self.critic})

    def step(self, episodes: Sequence[Episode], watch: Watch) -> tuple[dict[str, float], TokenStats]:
        """Train on this rank's episodes; metrics over all ranks and the old policy's statistics ``[T]``."""
        per_mini_batch = len(episodes) * self.config.train.mini_batch_prompts // self.config.rollout.prompts
        mini_batches = [list(range(i, i + per_mini_batch)) for i in range(0, len(episodes), per_mini_batch)]
        packed = [self.pack([episodes[i] for i in chosen]) for chosen in mini_batches]
        whole, old = self.compute_old_logprobs(episodes, packed, watch)
        if old is None:
            return self.only_update(whole, episodes, packed, watch)
        metrics = self.describe(whole, old, episodes) | self.method.on_step_start(whole, old, self.reduce)
        parts = [whole.select(chosen) for chosen in mini_batches]
        batches = [(self.set_token_weights(batch), position) for batch, position in parts]
        updates: Counter[str] = Counter()
        if self.critic is not None:
            with watch.phase("critic", total=len(mini_batches)) as phase:
                for (batch, _), micro_batches in zip(batches, packed, strict=True):
                    updates.update(self.update_critic(self.critic, batch, micro_batches))
                    phase.advance(tokens=len(batch.mask))
        if self.method.updates_policy:
            with watch.phase("update", total=len(mini_batches)) as phase:
                for number, ((batch, position), micro_batches) in enumerate(zip(batches, packed, strict=True)):
                    current = old.map(lambda value, position=position: value[position])
                    if number > 0:
                        needs = self.method.needs
                        current = self.statistics(self.policy, micro_batches, needs) if needs.current else None
                    updates.update(self.update(batch, current, micro_batches))
                    phase.advance(tokens=len(batch.mask))
        for each in self.trained.values():
            each.model.finish_param_sync()
        return metrics | {name: value / len(mini_batches) for name, value in updates.items()}, old

    def only_update(
        self, whole: Batch, episodes: Sequence[Episode], packed: list[MicroBatches], watch: Watch
    ) -> tuple[dict[str, float], TokenStats]:
        """The step's one update, whose own forward measures the policy that sampled: ``step`` without a pass before."""
        [micro_batches] = packed
        metrics = self.method.on_step_start(whole, None, self.reduce)
        with watch.phase("update", total=1) as phase:
            prepared = self.method.prepare(whole, None, self.reduce)
            results, values = self.backward(whole, prepared, micro_batches, self.reported, measures_old=True)
            old = self.joined(results, micro_batches)
            metrics |= self.describe(known_old(whole, old.logprob), old, episodes) | values | prepared.report
            metrics |= self.apply()
            phase.advance(tokens=len(whole.mask))
        return metrics, old

    @property
    def update_measures_old(self) -> bool:
        """Whether the step's only update sees the policy that sampled before anything needs its statistics."""
        config, needs = self.config, self.method.needs
        single = config.train.mini_batch_prompts == config.rollout.prompts
        return single and not (needs.old or needs.current or needs.value or config.train.importance_cap)

    @property
    def reported(self) -> Needs:
        """What the method needs, and what a step reports of the policy that sampled."""
        needs = self.method.needs
        logged = NUCLEUS_P if self.config.log.nucleus else None
        return replace(needs, entropy=True, nucleus_p=needs.nucleus_p or logged)

    def compute_old_logprobs(
        self, episodes: Sequence[Episode], packed: list[MicroBatches], watch: Watch
    ) -> tuple[Batch, TokenStats | None]:
        """The whole step as the models see it before its first update: the batch with its advantages, statistics.

        No statistics where the update measures them.
        """
        old = ref = value = None
        with watch.phase("old_logprob", total=len(packed)) as phase:
            if not self.update_measures_old:
                parts = []
                for micro_batches in packed:
                    parts.append(self.statistics(self.policy, micro_batches, self.reported))
                    phase.advance(tokens=len(parts[-1].logprob))
                old = TokenStats(**{n: torch.cat([p.present()[n] for p in parts]) for n in parts[0].present()})
            if self.reference is not None:
                with self.reference.present() as reference:
                    ref = torch.cat(
                        [self.statistics(reference, micro_batches, Needs()).logprob for micro_batches in packed]
                    )
            if self.critic is not None:
                value = torch.cat([critic.values(self.critic, micro_batches) for micro_batches in packed])
        return self.set_token_weights(self.batch(episodes, old, ref, value)), old

    def describe(self, batch: Batch, old: TokenStats, episodes: Sequence[Episode]) -> dict[str, float]:
        """What the step's batch looks like. Raises MismatchError where the engine samples from another policy."""
        metrics = summarise(batch, old, episodes, self.reduce)
        mismatch.check(metrics, self.config)
        return metrics

    def update(self, batch: Batch, current: TokenStats | None, micro_batches: MicroBatches) -> dict[str, float]:
        """One optimizer step on one mini-batch."""
        prepared, values = self.gradients(batch, current, micro_batches)
        return values | prepared.report | self.apply()

    def apply(self) -> dict[str, float]:
        """The optimizer step with the gradient in the buffers."""
        norm, lr = self.actor.update(self.config.train.max_bad_steps)
        return {"grad/norm": norm, "optimizer/lr": lr, "grad/skipped": float(norm != norm)}

    def update_critic(self, model: TrainableModel, batch: Batch, micro_batches: MicroBatches) -> dict[str, float]:
        """The same for the critic, whose loss needs nothing but the values."""
        values = critic.gradients(model, self.method, batch, micro_batches, self.reduce)
        norm, lr = model.update(self.config.train.max_bad_steps)
        return values | {"critic/grad_norm": norm, "critic/lr": lr, "critic/skipped": float(norm != norm)}

    def gradients(
        self, batch: Batch, current: TokenStats | None, micro_batches: MicroBatches
    ) -> tuple[Prepared, dict[str, float]]:
        """Leave the gradient of the mini-batch's loss in the optimizer's buffers; the metrics of its tokens."""
        prepared = self.method.prepare(batch, current, self.reduce)
        _, metrics = self.backward(batch, prepared, micro_batches, self.method.needs)
        return prepared, metrics

    def backward(
        self, batch: Batch, prepared: Prepared, micro_batches: MicroBatches, needs: Needs, *, measures_old: bool = False
    ) -> tuple[list[TokenStats] | None, dict[str, float]]:
        """``gradients`` under a plan, with the statistics of each micro-batch on the last stage.

        With ``measures_old`` they are also those of the policy that sampled: every ratio is 1.
        """
        splits = [batch.select(chosen) for chosen, _ in micro_batches]
        sums: list[dict[str, Tensor]] = []

        def loss(number: int, stats: TokenStats) -> Tensor:
            micro_batch, position = splits[number]
            if measures_old:
                micro_batch = known_old(micro_batch, stats.logprob.detach())
            part = prepared.select(position)
            value = self.method.loss(micro_batch, stats, part).sum()
            with torch.no_grad():
                own = self.method.metrics(micro_batch, stats.detach(), part)
                sums.append(own | {"loss/total": value.detach().clone()})
            return value

        self.actor.zero_grad()
        temperature = self.config.rollout.temperature
        results = forward_backward(self.policy, [packed for _, packed in micro_batches], needs, temperature, loss)
        state = self.method.state_dict()
        if state:  # a micro-batch's loss may have moved it, on the last stages only: a run has one state
            self.method.load_state_dict(parallel.from_first_copy(state))
        return results, totals(sums, batch, self.reduce)

    def pack(self, episodes: Sequence[Episode]) -> MicroBatches:
        """Micro-batches of a mini-batch: the sequences of each and its packed tokens; as many on every rank."""
        sequences = [(e.sample.prompt_ids, e.sample.response_ids) for e in episodes]
        lengths = [len(prompt) + len(response) for prompt, response in sequences]
        budget = self.config.train.micro_batch_tokens
        num_bins = parallel.num_micro_batches(len(packing.split(lengths, budget)), self.config.parallel)
        bins = packing.split(lengths, budget, num_bins)
        multiple = self.config.parallel.tensor if self.config.parallel.sequence else 1
        return [(chosen, packing.pack([sequences[i] for i in chosen], multiple=multiple)) for chosen in bins]

    def statistics(self, policy: Policy, micro_batches: MicroBatches, needs: Needs) -> TokenStats:
        """Statistics of a mini-batch without gradient, in the order of its tokens, on every stage."""
        return self.joined(
            forward(policy, [packed for _, packed in micro_batches], needs, self.config.rollout.temperature),
            micro_batches,
        )

    def joined(self, results: list[TokenStats] | None, micro_batches: MicroBatches) -> TokenStats:
        """The last stage's statistics of each micro-batch in the order of the mini-batch's tokens, on every stage."""
        joined = None
        if results is not None:
            order = packing.positions(micro_batches).to(cpu_compat.device())
            joined = {
                name: torch.cat([part.present()[name] for part in results])[order] for name in results[0].present()
            }
        return TokenStats(**parallel.from_last_stage(joined))

    def batch(
        self, episodes: Sequence[Episode], old: TokenStats | None, ref: Tensor | None, value: Tensor | None = None
    ) -> Batch:
        """The whole step on this rank with its advantages, not yet weighed; ``old`` None: not known yet."""
        to = cpu_compat.device()
        lengths = torch.tensor([len(e.sample.response_ids) for e in episodes], device=to)
        reward = torch.tensor([e.reward.value for e in episodes], dtype=torch.float32, device=to)
        group = torch.tensor([e.group for e in episodes], device=to)
        sequence = torch.repeat_interleave(torch.arange(len(episodes), device=to), lengths)
        reported = torch.tensor([x for e in episodes for x in e.sample.logprobs], dtype=torch.float32, device=to)
        old_logprob = torch.full_like(reported, torch.nan) if old is None else old.logprob
        rollout = mismatch.known(reported, old_logprob)
        batch = Batch(
            sequence=sequence,
            mask=~reward.isnan()[sequence],
            weight=torch.zeros_like(old_logprob),
            old_logprob=old_logprob,
            rollout_logprob=rollout,
            importance=mismatch.importance(old_logprob, rollout, self.config.train.importance_cap),
            ref_logprob=ref,
            reward=reward,
            advantage=torch.zeros_like(old_logprob),
            group=group,
            truncated=torch.tensor([e.sample.truncated for e in episodes], device=to),
            num_sequences=0,
            num_tokens=0,
            old_value=value,
        )
        return self.method.compute_advantages(batch, self.reduce)

    def set_token_weights(self, batch: Batch) -> Batch:
        """Count valid sequences and tokens over all ranks and fix the token weights."""
        counts = torch.tensor([num_valid(batch), int(batch.mask.sum())], device=batch.mask.device)
        num_sequences, num_tokens = self.reduce.sum(counts).tolist()
        weight = token_weights(
            self.method.aggregation,
            batch.sequence,
            batch.mask,
            num_sequences=num_sequences,
            num_tokens=num_tokens,
            max_response_tokens=self.config.rollout.max_response_tokens,
        )
        return replace(batch, weight=weight, num_sequences=num_sequences, num_tokens=num_tokens)


def known_old(batch: Batch, old_logprob: Tensor) -> Batch:
    """A batch whose old policy was not known yet, now that it is measured."""
    rollout = mismatch.known(batch.rollout_logprob, old_logprob)
    return replace(batch, old_logprob=old_logprob, rollout_logprob=rollout)
