"""One training step: episodes in, updated policy and metrics out.

old     = statistics of the policy that sampled, over the whole step        (no gradient)
method.observe(step, old)                                                  anchors, controllers
for each mini-batch:
    current = old while the policy has not moved, else a pass without gradient (if the method asks)
    plan    = method.prepare(mini-batch, current)                          whole-mini-batch statistics
    for each micro-batch: backward of sum(method.loss(micro-batch, statistics, plan))
    clip, AdamW step
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from torch import Tensor

from megatron_ext import host
from megatron_ext.methods.base import Method, Needs, Plan, num_valid
from megatron_ext.model.build import Policy
from megatron_ext.model.forward import forward, forward_backward
from megatron_ext.train import packing, parallel
from megatron_ext.train.config import Config
from megatron_ext.train.metrics import Watch
from megatron_ext.train.summary import summarise
from megatron_ext.train.token_weights import token_weights
from megatron_ext.types import Batch, Episode, PackedSequences, TokenStats


class TrainingError(RuntimeError):
    """Training cannot go on: gradients stay non-finite."""


@dataclass
class Learner:
    """The policy with everything that changes it. ``step`` is the training step of the module's docstring."""

    config: Config
    method: Method
    policy: Policy
    optimizer: MegatronOptimizer
    scheduler: OptimizerParamScheduler
    reference: Policy | None = None
    bad_steps: int = 0
    reduce: parallel.DataReducer = field(default_factory=parallel.DataReducer)

    def step(self, episodes: Sequence[Episode], watch: Watch) -> tuple[dict[str, float], TokenStats]:
        """Train on this rank's episodes; metrics over all ranks and the old policy's statistics ``[T]``."""
        per_mini = len(episodes) * self.config.train.mini_batch_prompts // self.config.rollout.prompts
        minis = [list(range(i, i + per_mini)) for i in range(0, len(episodes), per_mini)]
        packed = [self.pack([episodes[i] for i in rows]) for rows in minis]
        with watch.phase("old_logprob", total=len(minis)) as phase:
            needs = self.method.needs
            observed = replace(needs, entropy=True, nucleus_p=needs.nucleus_p or 0.8)
            parts = []
            for rows, micros in zip(minis, packed, strict=True):
                parts.append(self.statistics(self.policy, micros, observed))
                phase.advance(tokens=sum(len(episodes[i].sample.response_ids) for i in rows))
            old = TokenStats(**{n: torch.cat([p.present()[n] for p in parts]) for n in parts[0].present()})
            ref = None
            if self.reference is not None:
                ref = torch.cat([self.statistics(self.reference, micros, Needs()).logprob for micros in packed])
        whole = self.weigh(self.batch(episodes, old, ref))
        metrics = summarise(whole, old, episodes, self.reduce)
        metrics |= self.method.observe(whole, old, self.reduce)
        updates: Counter[str] = Counter()
        with watch.phase("update", total=len(minis)) as phase:
            for number, (rows, micros) in enumerate(zip(minis, packed, strict=True)):
                batch, position = whole.rows(rows)
                current = old.map(lambda value, position=position: value[position])
                if number > 0:
                    current = self.statistics(self.policy, micros, needs) if needs.current else None
                updates.update(self.update(self.weigh(batch), current, micros))
                phase.advance(tokens=len(batch.mask))
        return metrics | {name: value / len(minis) for name, value in updates.items()}, old

    def update(
        self, batch: Batch, current: TokenStats | None, micros: list[tuple[list[int], PackedSequences]]
    ) -> dict[str, float]:
        """One optimizer step on one mini-batch."""
        plan, values = self.gradients(batch, current, micros)
        norm = self._apply()
        lr = self.optimizer.param_groups[0]["lr"]
        if math.isfinite(norm):
            self.scheduler.step(1)
        return values | plan.report | {"grad/norm": norm, "optimizer/lr": lr, "grad/skipped": 0.0 + (norm != norm)}

    def gradients(
        self, batch: Batch, current: TokenStats | None, micros: list[tuple[list[int], PackedSequences]]
    ) -> tuple[Plan, dict[str, float]]:
        """Leave the gradient of the mini-batch's loss in the optimizer's buffers; the metrics of its tokens."""
        plan = self.method.prepare(batch, current, self.reduce)
        splits = [batch.rows(rows) for rows, _ in micros]
        sums: list[dict[str, Tensor]] = []

        def loss(number: int, stats: TokenStats) -> Tensor:
            micro, position = splits[number]
            part = plan.select(position)
            value = self.method.loss(micro, stats, part).sum()
            with torch.no_grad():
                own = self.method.metrics(micro, stats.detach(), part) | {"loss/total": value.detach().clone()}
                sums.append({name: x.double() for name, x in own.items()})
            return value

        for chunk in self.policy.chunks:
            chunk.zero_grad_buffer()
        self.optimizer.zero_grad()
        temperature = self.config.rollout.temperature
        results = forward_backward(self.policy, [p for _, p in micros], self.method.needs, temperature, loss)
        total = {n: torch.stack([s[n] for s in sums]).sum() for n in sums[0]} if results is not None else None
        total = parallel.from_last_stage(total)
        reduced = self.reduce.sum(torch.stack(list(total.values()))).tolist()
        counted = max(batch.num_tokens, 1)
        return plan, {
            name: value / (1 if name.startswith("loss/") else counted)
            for name, value in zip(total, reduced, strict=True)
        }

    def _apply(self) -> float:
        """Clip and step; a non-finite gradient skips the update on every rank, since its norm is everyone's."""
        self.optimizer.prepare_grads()
        norm = float(self.optimizer.get_grad_norm())
        if math.isfinite(norm):
            self.optimizer.step()
            self.bad_steps = 0
            return norm
        self.bad_steps += 1
        if self.bad_steps >= self.config.train.max_bad_steps:
            raise TrainingError(
                f"the gradient was not finite in {self.bad_steps} updates in a row (train.max_bad_steps); "
                "the last checkpoint is intact: lower optimizer.lr, or inspect metrics.jsonl"
            )
        return math.nan

    def pack(self, episodes: Sequence[Episode]) -> list[tuple[list[int], PackedSequences]]:
        """Micro-batches of a mini-batch: the rows of each and its packed tokens; as many on every rank."""
        sequences = [(e.sample.prompt_ids, e.sample.response_ids) for e in episodes]
        lengths = [len(prompt) + len(response) for prompt, response in sequences]
        budget = self.config.train.micro_batch_tokens
        num_bins = parallel.largest(len(packing.split(lengths, budget)))
        bins = packing.split(lengths, budget, num_bins)
        multiple = self.config.parallel.tensor if self.config.parallel.sequence else 1
        return [(rows, packing.pack([sequences[i] for i in rows], multiple=multiple)) for rows in bins]

    def statistics(self, policy: Policy, micros: list[tuple[list[int], PackedSequences]], needs: Needs) -> TokenStats:
        """Statistics of a mini-batch without gradient, in the order of its tokens, on every stage."""
        results = forward(policy, [packed for _, packed in micros], needs, self.config.rollout.temperature)
        joined = None
        if results is not None:
            order = _positions(micros).to(host.device())
            joined = {
                name: torch.cat([part.present()[name] for part in results])[order] for name in results[0].present()
            }
        return TokenStats(**parallel.from_last_stage(joined))

    def batch(self, episodes: Sequence[Episode], old: TokenStats, ref: Tensor | None) -> Batch:
        """The whole step on this rank with its advantages, not yet weighed."""
        to = host.device()
        lengths = torch.tensor([len(e.sample.response_ids) for e in episodes], device=to)
        reward = torch.tensor([e.reward.value for e in episodes], dtype=torch.float32, device=to)
        group = torch.tensor([e.group for e in episodes], device=to)
        sequence = torch.repeat_interleave(torch.arange(len(episodes), device=to), lengths)
        rollout = torch.tensor([x for e in episodes for x in e.sample.logprobs], dtype=torch.float32, device=to)
        batch = Batch(
            sequence=sequence,
            mask=~reward.isnan()[sequence],
            weight=torch.zeros_like(old.logprob),
            old_logprob=old.logprob,
            rollout_logprob=rollout,
            ref_logprob=ref,
            reward=reward,
            advantage=torch.zeros_like(old.logprob),
            group=group,
            truncated=torch.tensor([e.sample.truncated for e in episodes], device=to),
            num_sequences=0,
            num_tokens=0,
        )
        return self.method.credit(batch, self.reduce)

    def weigh(self, batch: Batch) -> Batch:
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


def _positions(micros: list[tuple[list[int], PackedSequences]]) -> Tensor:
    """Where each token of the mini-batch stands in its micro-batches laid end to end, ``[T]``."""
    starts: dict[int, tuple[int, int]] = {}
    offset = 0
    for rows, packed in micros:
        lengths = packed.response_lengths
        for row, length in zip(rows, lengths, strict=True):
            starts[row] = (offset, length)
            offset += length
    return torch.cat([torch.arange(start, start + length) for _, (start, length) in sorted(starts.items())])
