"""One training step: episodes in, updated policy and metrics out.

old         = statistics of the step's first policy, over the whole step    (no gradient; of the first mini-batch by
                                                                            its update, where nothing needs them before;
                                                                            mini-batches that fit into one micro-batch
                                                                            are measured together)
              and, under sampling replay, what its sampler kept where the engine does not tell.
              It is the policy that sampled, or under ``rollout.max_lag`` a newer one
value       = the critic's values, where the method has one                 (no gradient)
advantages  = method.compute_advantages(rollouts)                           and the returns that the critic learns
method.on_step_start(batch, old)                                            anchors, controllers
for each mini-batch, where there is a critic: its update                    (critic.py)
for each mini-batch, unless the method leaves the policy alone in this step:
    current  = old while the policy has not moved, else a pass without gradient (if the method asks); where the
               mini-batch is one micro-batch, the update's own forward
    prepared = method.prepare(mini-batch, current)                          whole-mini-batch statistics
    for each micro-batch: backward of sum(method.loss(micro-batch, statistics, prepared)); in the first update the
               forward's own statistics are the old ones, so that every ratio, of probabilities or of entropies, is
               exactly 1
    clip, AdamW step
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial

import torch
from torch import Tensor

from megatron_ext import cpu_compat
from megatron_ext.config.schema import Config
from megatron_ext.methods.base import Method, Needs, Reducer, num_valid
from megatron_ext.metrics.display import Watch
from megatron_ext.metrics.step_metrics import summarise
from megatron_ext.model import parallel
from megatron_ext.model.build import Policy
from megatron_ext.model.forward import forward, forward_backward
from megatron_ext.model.reference import Reference
from megatron_ext.model.trainable import TrainableModel, totals
from megatron_ext.train import critic, mismatch, routing, verdicts
from megatron_ext.train.method_factory import measures_old_in_update
from megatron_ext.train.mini_batches import Packer
from megatron_ext.train.packing import MiniBatch
from megatron_ext.train.timeline import meet
from megatron_ext.train.token_weights import token_weights
from megatron_ext.types import Advantages, Batch, Episode, RolloutBatch, TokenStats

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
    def packer(self) -> Packer:
        return Packer(self.config, self.policy)

    @property
    def trained(self) -> dict[str, TrainableModel]:
        """All models that train, by name."""
        return {"policy": self.actor} | ({} if self.critic is None else {"critic": self.critic})

    @property
    def frozen(self) -> dict[str, Policy]:
        """Models that do not train and yet are no longer what model.path holds: the reference, if stages restart."""
        if self.reference is None or not self.config.data.stage_restart:
            return {}
        return {"reference": self.reference.policy}

    def step(self, episodes: Sequence[Episode], watch: Watch, *, lag: int = 0) -> tuple[dict[str, float], TokenStats]:
        """Train on this rank's episodes; metrics over all ranks and the old policy's statistics ``[T]``.

        The old policy is that of the step's beginning, whose weights are ``lag`` steps newer than those that sampled.
        """
        routing.begin_step(self.policy)
        spans = self.packer.spans(episodes)
        of_spans = [[episodes[i] for i in span] for span in spans]
        mini_batches = self.packer.pack(of_spans)
        unmeasured = int(self.first_update_measures_old(mini_batches))
        rollouts, known = self.compute_old_logprobs(
            episodes,
            mini_batches[:unmeasured],
            self.packer.joined_neighbours(of_spans[unmeasured:], mini_batches[unmeasured:]),
            watch,
        )
        old = None if unmeasured else known
        advantages = self.method.compute_advantages(rollouts, self.reduce)
        whole = self.batch(rollouts, advantages)
        metrics = {} if old is None else self.describe(whole, old, episodes, lag)
        metrics |= self.method.on_step_start(whole, old, self.reduce)
        parts = [rollouts.select(span) for span in spans]
        batches = [(self.batch(part, advantages.select(position)), position) for part, position in parts]
        updates: Counter[str] = Counter()
        if self.critic is not None:
            exchange = self.critic.model.before_gradient_exchange(partial(meet, watch))
            with watch.phase("critic", total=len(mini_batches)) as phase, exchange:
                for (batch, _), mini_batch in zip(batches, mini_batches, strict=True):
                    updates.update(self.update_critic(self.critic, batch, mini_batch))
                    phase.advance(tokens=len(batch.mask))
        if self.method.updates_policy:
            exchange = self.policy.before_gradient_exchange(partial(meet, watch))
            with watch.phase("update", total=len(mini_batches)) as phase, exchange:
                for number, ((batch, position), mini_batch) in enumerate(zip(batches, mini_batches, strict=True)):
                    if old is None:
                        values, results = self.gradients(batch, None, mini_batch, self.reported, measures_old=True)
                        old = joined_stats(self.joined(results, mini_batch), known)
                        metrics = self.describe(whole, old, episodes, lag) | metrics
                        updates.update(values | self.apply())
                    else:
                        current = old.map(lambda value, at=position: value[at]) if number == 0 else None
                        updates.update(self.update(batch, current, mini_batch, watch))
                    phase.advance(tokens=len(batch.mask))
        elif old is None:
            old = joined_stats(self.statistics(self.policy, mini_batches[0], self.reported), known)
            metrics = self.describe(whole, old, episodes, lag) | metrics
        for each in self.trained.values():
            each.end_step()
        assert old is not None
        return metrics | {name: value / len(mini_batches) for name, value in updates.items()}, old

    def first_update_measures_old(self, mini_batches: Sequence[MiniBatch]) -> bool:
        """Whether the first mini-batch needs no pass of its own for the policy that sampled."""
        return self.update_measures_old and not self.reference_waits_for_support(mini_batches)

    @property
    def update_measures_old(self) -> bool:
        """Whether nothing needs the statistics of the policy that sampled before the first update."""
        return measures_old_in_update(self.config, self.method.needs)

    def reference_waits_for_support(self, mini_batches: Sequence[MiniBatch]) -> bool:
        """Whether a pass of the policy must find what the sampler kept before the reference is measured on it.

        Without a reference the step's first update finds it in its own forward: the policy has not moved by then.
        """
        if self.reference is None or not self.config.rollout.replays_sampling:
            return False
        return bool(parallel.max_over_ranks([not all(each.is_support_known for each in mini_batches)])[0])

    @property
    def reported(self) -> Needs:
        """What the method needs, and what a step reports of the policy that sampled."""
        needs = self.method.needs
        logged = NUCLEUS_P if self.config.log.nucleus and needs.min_p is None else None
        return replace(needs, entropy=True, nucleus_p=needs.nucleus_p or logged)

    def compute_old_logprobs(
        self, episodes: Sequence[Episode], unmeasured: list[MiniBatch], measured: list[MiniBatch], watch: Watch
    ) -> tuple[RolloutBatch, TokenStats | None]:
        """The whole step as the models see it before its first update, and the statistics of the policy that sampled,
        of the ``measured`` sequences; None where there are none. Those of the ``unmeasured``, which come first, are
        found by their update."""
        old = ref = value = None
        every = [*unmeasured, *measured]
        with watch.phase("old_logprob", total=len(measured)) as phase:
            if measured:
                parts = []
                for mini_batch in measured:
                    parts.append(self.statistics(self.policy, mini_batch, self.reported))
                    phase.advance(tokens=len(parts[-1].logprob))
                old = joined_stats(*parts)
            if self.reference is not None:
                with self.reference.present() as reference:
                    ref = torch.cat([self.statistics(reference, each, Needs()).logprob for each in every])
            if self.critic is not None:
                value = torch.cat([critic.values(self.critic, each) for each in every])
            meet(watch)
        return self.rollout_batch(episodes, old, ref, value), old

    def describe(self, batch: Batch, old: TokenStats, episodes: Sequence[Episode], lag: int) -> dict[str, float]:
        """What the step's batch looks like, whose ``old`` may just have been measured. Raises MismatchError where the
        engine samples from another policy, VerifierError where too many responses have no verdict."""
        batch = known_old(batch, old)
        metrics = summarise(batch, old, episodes, self.reduce) | routing.describe(episodes, self.policy, self.reduce)
        metrics |= mismatch.corrections(batch, self.config.importance, self.reduce)
        mismatch.check(metrics, self.config, lag=lag)
        rollout = self.config.rollout
        verdicts.check(metrics, rollout.prompts * rollout.samples, self.config.reward.max_timeout_share)
        return metrics

    def update(self, batch: Batch, current: TokenStats | None, mini_batch: MiniBatch, watch: Watch) -> dict[str, float]:
        """One optimizer step on one mini-batch; ``current`` None: the policy has moved since it was measured."""
        has_moved = current is None
        if has_moved and self.method.needs.current and not self.is_one_pass(mini_batch):
            current = self.statistics(self.policy, mini_batch, self.method.needs)
            meet(watch)
        values, _ = self.gradients(batch, current, mini_batch, measures_old=not has_moved)
        return values | self.apply()

    def apply(self) -> dict[str, float]:
        """The optimizer step with the gradient in the buffers."""
        norm, lr = self.actor.update(self.config.train.max_bad_steps)
        return {"grad/norm": norm, "optimizer/lr": lr, "grad/skipped": float(norm != norm)}

    def update_critic(self, model: TrainableModel, batch: Batch, mini_batch: MiniBatch) -> dict[str, float]:
        """One optimizer step of the critic on one mini-batch; its loss needs nothing but the values."""
        values = critic.gradients(model, self.method, batch, mini_batch, self.reduce)
        norm, lr = model.update(self.config.train.max_bad_steps)
        return values | {"critic/grad_norm": norm, "critic/lr": lr, "critic/skipped": float(norm != norm)}

    def gradients(
        self,
        batch: Batch,
        current: TokenStats | None,
        mini_batch: MiniBatch,
        needs: Needs | None = None,
        *,
        measures_old: bool = False,
    ) -> tuple[dict[str, float], list[TokenStats] | None]:
        """Leave the gradient of the mini-batch's loss in the buffers; its metrics, and the statistics (of ``needs``, by
        default the method's) of each micro-batch's forward, on the last stage.

        ``current`` None, though the method needs it: the mini-batch is one micro-batch, whose forward measures it.
        With ``measures_old`` the forward's statistics are also those of the policy that sampled: every ratio is 1.
        """
        method, parts = self.method, mini_batch.split(batch)
        found_by_forward = method.needs.current and current is None
        prepared = None if found_by_forward else method.prepare(batch, current, self.reduce)
        sums: list[dict[str, Tensor]] = []

        def loss(number: int, stats: TokenStats) -> Tensor:
            nonlocal prepared
            seen = stats.detach()
            if prepared is None:
                prepared = method.prepare(batch, seen, self.reduce)
            micro_batch, position = parts[number]
            if measures_old:
                micro_batch = known_old(micro_batch, seen)
            part = prepared.select(position)
            value = method.loss(micro_batch, stats, part).sum()
            with torch.no_grad():
                sums.append(method.metrics(micro_batch, seen, part) | {"loss/total": value.detach().clone()})
            return value

        self.actor.zero_grad()
        temperature = self.config.rollout.temperature
        results = forward_backward(self.policy, mini_batch.micro_batches, needs or method.needs, temperature, loss)
        if method.loss_moves_state:  # on the last stages only: the run goes on with one state
            method.load_state_dict(parallel.from_first_copy(method.state_dict()))
        assert prepared is not None
        return totals(sums, batch, self.reduce) | prepared.report, results

    def is_one_pass(self, mini_batch: MiniBatch) -> bool:
        """Whether one forward sees the whole mini-batch, on every rank."""
        return len(mini_batch.micro_batches) == 1 and self.config.parallel.pipeline == 1

    def statistics(self, policy: Policy, mini_batch: MiniBatch, needs: Needs) -> TokenStats:
        """Statistics of a mini-batch without gradient, in the order of its tokens, on every stage."""
        results = forward(policy, mini_batch.micro_batches, needs, self.config.rollout.temperature)
        return self.joined(results, mini_batch)

    def joined(self, results: list[TokenStats] | None, mini_batch: MiniBatch) -> TokenStats:
        """The last stage's statistics of each micro-batch in the order of the mini-batch's tokens, on every stage."""
        found = None
        if results is not None:
            names = results[0].present()
            found = {name: mini_batch.join([part.present()[name] for part in results]) for name in names}
        return TokenStats(**parallel.from_last_stage(found))

    def rollout_batch(
        self, episodes: Sequence[Episode], old: TokenStats | None, ref: Tensor | None, value: Tensor | None = None
    ) -> RolloutBatch:
        """The episodes' tokens with what the models say about them; those before ``old`` are not known yet."""
        to = cpu_compat.device()
        lengths = torch.tensor([len(e.sample.response_ids) for e in episodes], device=to)
        reward = torch.tensor([e.reward.value for e in episodes], dtype=torch.float32, device=to)
        sequence = torch.repeat_interleave(torch.arange(len(episodes), device=to), lengths)
        reported = torch.tensor([x for e in episodes for x in e.sample.logprobs], dtype=torch.float32, device=to)
        old_logprob = torch.full_like(reported, torch.nan)
        if old is not None:
            old_logprob[len(reported) - len(old.logprob) :] = old.logprob
        rollout_logprob = mismatch.known(reported, old_logprob)
        return RolloutBatch(
            sequence=sequence,
            mask=~reward.isnan()[sequence],
            old_logprob=old_logprob,
            rollout_logprob=rollout_logprob,
            ref_logprob=ref,
            reward=reward,
            group=torch.tensor([e.group for e in episodes], device=to),
            truncated=torch.tensor([e.sample.truncated for e in episodes], device=to),
            old_value=value,
            importance=mismatch.importance(old_logprob, rollout_logprob, sequence, self.config.importance),
            old=old if self.method.needs.old else None,
        )

    def batch(self, rollouts: RolloutBatch, advantages: Advantages) -> Batch:
        """What the method trains on: valid sequences and tokens counted over all ranks, the token weights fixed."""
        counts = torch.tensor([num_valid(rollouts), int(rollouts.mask.sum())], device=rollouts.mask.device)
        num_sequences, num_tokens = self.reduce.sum(counts).tolist()
        weight = token_weights(
            self.method.aggregation,
            rollouts.sequence,
            rollouts.mask,
            num_sequences=num_sequences,
            num_tokens=num_tokens,
            max_response_tokens=self.config.rollout.max_response_tokens,
        )
        return rollouts.complete(advantages, weight=weight, num_sequences=num_sequences, num_tokens=num_tokens)


def joined_stats(*parts: TokenStats | None) -> TokenStats:
    """Statistics of tokens one after the other; None: of no token."""
    found = [part.present() for part in parts if part is not None]
    return TokenStats(**{name: torch.cat([part[name] for part in found]) for name in found[0]})


def known_old(batch: Batch, old: TokenStats) -> Batch:
    """A batch with the old policy's statistics, now that they are measured, in the place of what it had of them."""
    rollout = mismatch.known(batch.rollout_logprob, old.logprob)
    kept = None if batch.old is None else old
    return replace(batch, old_logprob=old.logprob, rollout_logprob=rollout, old=kept)
