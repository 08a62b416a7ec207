"""One mini-batch with the full logits of three policies, in fp64, and the code under test run on it.

A test writes its method's equations on ``Case`` (loops over responses, nothing shared with the package) and
compares loss and gradient with respect to the logits with ``run``, which gives a method only the statistics it asked
for, on any number of data-parallel ranks (threads) and any split into micro-batches.
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from megatron_ext import methods
from megatron_ext.methods.base import Method, Needs, OneRank, Prepared, Reducer
from megatron_ext.train.token_weights import token_weights
from megatron_ext.types import Batch, RolloutBatch, TokenStats

VOCAB = 11
MAX_LENGTH = 9
REWARDS = (
    [1.0, 0.0, 0.0],
    [0.0, 1.0, 1.0, 0.0],
    [1.0, 1.0, 1.0],
    [float("nan"), 0.0, 1.0, 0.0],
    [0.0, 0.0, 0.0],
    [1.0],
)
WHOLE = (range(len(REWARDS)),)  # one rank with all groups
TWO_RANKS = (range(2), range(2, len(REWARDS)))

RANGE_FROM_ABOVE = {"h_low": 9.0, "h_high": 9.5, "h_low_end": 0.1, "h_high_end": 0.2, "anneal_steps": 3}
NARROW_CLIP = {"clip_low": 0.1, "clip_high": 1 / 0.9 - 1, "dual_clip": 1.4, "target": 9.0, "delta": 0.1, "k_0": 0.1}

# Options at which every part of a method is at work on the case; also what the splits and layouts are tested with.
OPTIONS: dict[str, dict[str, Any]] = {
    "grpo": {"name": "grpo", "beta": 0.3, "dual_clip": 1.2},
    "grpo, gspo": {"name": "grpo", "surrogate": {"kind": "gspo", "clip_low": 0.05, "clip_high": 0.1}},
    "grpo, cispo": {"name": "grpo", "surrogate": {"kind": "cispo", "clip_low": 0.2, "clip_high": 0.3}},
    "grpo, sapo": {"name": "grpo", "surrogate": {"kind": "sapo", "tau_pos": 2.0, "tau_neg": 3.0}},
    "grpo, minirl": {"name": "grpo", "surrogate": "minirl"},
    "grpo, topr": {"name": "grpo", "surrogate": "topr"},
    "grpo, topr, token": {"name": "grpo", "surrogate": {"kind": "topr", "level": "token"}},
    "dr_grpo": {"name": "dr_grpo"},
    "clip_higher": {"name": "clip_higher", "overlong_max": 9, "overlong_buffer": 6},
    "entropy_bonus": {"name": "entropy_bonus", "coef": 0.2},
    "entropy_bonus, token": {"name": "entropy_bonus", "coef": 0.2, "entropy_aggregation": "token-mean"},
    "high_entropy_reward": {"name": "high_entropy_reward", "coef": 0.2, "rho": 0.3},
    "clip_cov": {"name": "clip_cov", "r": 0.05, "w_low": 0.1, "w_high": 3.0},
    "kl_cov": {"name": "kl_cov", "k": 0.2, "kl_coef": 0.7},
    "kl_cov, k3": {"name": "kl_cov", "k": 0.2, "kl_coef": 0.7, "kl": "k3"},
    "forking_tokens, response": {"name": "forking_tokens", "rho": 0.3, "quantile": "response"},
    "forking_tokens": {"name": "forking_tokens", "rho": 0.3, "overlong_max": 9, "overlong_buffer": 6},
    "forking_tokens, all": {"name": "forking_tokens", "rho": 0.2, "denominator": "all"},
    "ppo": {"name": "ppo", "gamma": 0.9, "lam": 0.8, "value_clip": 0.2, "overlong_max": 9, "overlong_buffer": 6},
    "nsr": {"name": "nsr"},
    "psr": {"name": "psr"},
    "w_reinforce": {"name": "w_reinforce"},
    "aec": {"name": "aec", "target": 9.0, "c_0": 0.3, "c_max": 0.5},
    "aec, authors": {
        **{"name": "aec", "target": 9.0, "c_0": 0.3, "c_max": 0.5},
        **{"measure": "logprob", "gate": "previous"},
    },
    "dmmpt": {"name": "dmmpt", "tau": 0.7, "sigma": 1.2},
    "dmmpt, batch": {"name": "dmmpt", "tau": 0.7, "sigma": 1.45, "switch": "batch"},
    "siren": {"name": "siren", "coef": 0.7, "tau": 0.6},
    "siren, authors": {"name": "siren", "coef": 0.7, "tau": 0.3, "nucleus": "exclusive"},
    "siren, every token": {"name": "siren", "coef": 0.7, "top_p_mask": False, "peak_mask": False},
    "siren, bonus": {"name": "siren", "coef": 0.7, "tau": 0.6, "anchor": False},
    "aer": {"name": "aer", "alpha_0": 0.4, "rho": 0.6},
    "aer, everywhere": {"name": "aer", "alpha_0": 0.3, "target": 9.0, "allocate": False},
    "aer, unsolved": {"name": "aer", "alpha_0": 0.3, "target": 9.0, "rho": 0.0, "adapt": False},
    "entropy_advantage": {"name": "entropy_advantage"},
    "entropy_advantage_ppo": {"name": "entropy_advantage_ppo"},
    "entropy_advantage, gspo": {
        "name": "entropy_advantage",
        "surrogate": {"kind": "gspo", "clip_low": 0.05, "clip_high": 0.1},
    },
    "entropic": {"name": "entropic", "target": 0.8, "threshold": 0.6},
    "entropic, authors": {"name": "entropic", "target": 0.8, "threshold": 0.6, "normaliser": "high"},
    "entropic, full": {"name": "entropic", "target": 0.8, "form": "full"},
    "sent": {"name": "sent", "low_ratio": 0.7, "cov_ratio": 0.2},
    "sent, authors": {"name": "sent", "low_ratio": 0.7, "cov_ratio": 0.2, "variant": "authors", "beta": 0.1},
    "ce_gppo": {"name": "ce_gppo", "clip_low": 0.1, "clip_high": 0.1, "beta_2": 0.9},
    "ce_gppo, authors": {"name": "ce_gppo", "clip_low": 0.1, "clip_high": 0.1, "dual_clip": 1.3},
    "erc": {"name": "erc", "ratio_low": 0.9, "ratio_high": 1.2},
    "erc, preserve": {"name": "erc", "ratio_low": 0.9, "ratio_high": 1.2, "preserve": True, "dual_clip": 1.3},
    "lp_reg": {"name": "lp_reg", "rho": 0.6, "kappa": 0.05, "kl_coef": 0.7},
    "lp_reg, authors": {"name": "lp_reg", "rho": 0.4, "kappa": 0.05, "variant": "authors", "dual_clip": 0.0},
    "steer": {"name": "steer", "lambda_min": 0.3},
    "steer, authors": {"name": "steer", "lambda_min": 0.3, "variant": "authors", "dual_clip": 1.3},
    "adapo": {"name": "adapo", "target": 9.0, "delta": 0.1, "clip_high_max": 0.8},
    "entrocraft": {"name": "entrocraft", **RANGE_FROM_ABOVE},
    "entrocraft, above": {"name": "entrocraft", "h_low": 0.1, "h_high": 0.2, "h_low_end": 0.1, "h_high_end": 0.2},
    "entrocraft, authors": {"name": "entrocraft", "h_low": 0.1, "h_high": 0.2, "h_low_end": 0.1, "variant": "authors"},
    "mai_clip": {"name": "mai_clip", **NARROW_CLIP},
    "mai_clip, entropy": {"name": "mai_clip", **NARROW_CLIP, "measure": "entropy"},
    "qae": {"name": "qae"},
    "qae, authors": {"name": "qae", "interpolate": True},
    "repo": {"name": "repo", "target": 9.0, "zeta_0": 0.3, "zeta_max": 4.0},
    "repo, centred": {"name": "repo", "target": 9.0, "zeta_0": 0.3, "zeta_max": 4.0, "form": "centred"},
    "repo, full": {"name": "repo", "target": 9.0, "zeta_0": 0.3, "zeta_max": 4.0, "form": "full"},
}


@dataclass
class Case:
    """Packed tokens as in types.py; ``logits [T, V]`` is a leaf with gradient, ``old`` and ``ref`` are constants.

    ``value [T]`` is a critic's, a leaf with gradient, and ``old_value`` what it was before the step.
    """

    seed: int = 2
    rewards: Sequence[Sequence[float]] = REWARDS
    logits: Tensor = field(init=False)
    old: Tensor = field(init=False)
    ref: Tensor = field(init=False)
    value: Tensor = field(init=False)

    def __post_init__(self) -> None:
        draw = torch.Generator().manual_seed(self.seed)
        normal = lambda *shape: torch.randn(*shape, generator=draw, dtype=torch.float64)  # noqa: E731
        self.reward = torch.tensor([r for group in self.rewards for r in group])
        self.group = torch.tensor([g for g, group in enumerate(self.rewards) for _ in group])
        self.lengths = torch.randint(1, MAX_LENGTH + 1, (len(self.reward),), generator=draw)
        self.sequence = torch.repeat_interleave(torch.arange(len(self.reward)), self.lengths)
        shape = (len(self.sequence), VOCAB)
        peaked = 0.3 + 4 * torch.rand(shape[0], 1, generator=draw, dtype=torch.float64)  # entropies of all sizes
        logits = peaked * normal(*shape)
        self.token = torch.multinomial(logits.softmax(-1), 1, generator=draw)[:, 0]
        self.old = logits + 0.4 * normal(*shape)
        self.ref = logits + 0.8 * normal(*shape)
        self.logits = logits.requires_grad_()
        self.old_value = normal(shape[0])
        self.value = (self.old_value + 0.4 * normal(shape[0])).requires_grad_()

    @property
    def valid(self) -> list[int]:
        """Responses with a reward."""
        return [i for i in range(len(self.reward)) if not self.reward[i].isnan()]

    @property
    def tokens(self) -> list[int]:
        """Tokens of responses with a reward."""
        return [t for t in range(len(self.sequence)) if not self.reward[self.sequence[t]].isnan()]

    def tokens_of(self, i: int) -> range:
        """The tokens of response i."""
        start = int(self.lengths[:i].sum())
        return range(start, start + int(self.lengths[i]))

    def padded(self, value: Tensor) -> Tensor:
        """``[T] -> [B, MAX_LENGTH]``, with gradient, as verl has it."""
        place = torch.cat([i * MAX_LENGTH + torch.arange(int(n)) for i, n in enumerate(self.lengths)])
        whole = torch.zeros(len(self.lengths) * MAX_LENGTH, dtype=torch.float64).index_put((place,), value)
        return whole.view(len(self.lengths), MAX_LENGTH)

    def logp(self, logits: Tensor) -> Tensor:
        """Of the response's tokens, ``[T]``."""
        return logits.log_softmax(-1)[torch.arange(len(self.token)), self.token]

    @property
    def ratio(self) -> Tensor:
        return (self.logp(self.logits) - self.logp(self.old)).exp()

    def advantages(self, *, normalise: bool = True, reward: Tensor | None = None) -> Tensor:
        """Of each token, ``[T]``: the group-relative advantage of its response."""
        reward = self.reward if reward is None else reward
        result = torch.zeros(len(reward), dtype=torch.float64)
        for i in self.valid:
            own = [float(reward[j]) for j in self.valid if self.group[j] == self.group[i]]
            mean = sum(own) / len(own)
            std = (sum((r - mean) ** 2 for r in own) / max(len(own) - 1, 1)) ** 0.5
            result[i] = (float(reward[i]) - mean) / ((std + 1e-6) if normalise else 1)
        return result[self.sequence]

    def gradient(self, loss: Tensor) -> Tensor:
        [gradient] = torch.autograd.grad(loss, self.logits, retain_graph=True)
        return gradient


def entropy(logits: Tensor) -> Tensor:
    """Of the full vocabulary, ``[T]``."""
    logp = logits.log_softmax(-1)
    return -(logp.exp() * logp).sum(-1)


def clipped(ratio: Tensor, advantage: Tensor, low: float, high: float) -> Tensor:
    return -torch.min(ratio * advantage, ratio.clamp(1 - low, 1 + high) * advantage)


def nucleus_entropy(logits: Tensor, p: float, rule: str) -> Tensor:
    """Position by position: sort, walk until the mass reaches p, renormalise, ``[T]``."""
    result = []
    for row in logits.softmax(-1):
        mass, kept = 0.0, []
        for v in row.argsort(descending=True).tolist():
            if mass + float(row[v]) >= p and rule == "exclusive":
                break
            kept.append(v)
            mass += float(row[v])
            if mass >= p:
                break
        q = row[kept] / row[kept].sum()
        result.append(-(q * q.log()).sum())
    return torch.stack(result)


def without_noise(case: Case, logits: Tensor, kappa: float) -> tuple[Tensor, Tensor]:
    """Position by position: the probability of what is above kappa times the largest, and the token's log-probability
    there (minus infinity: it is below), ``[T]`` each."""
    mass, logprob = [], []
    for row, token in zip(logits.softmax(-1), case.token.tolist(), strict=True):
        p = row.tolist()
        kept = [v for v in range(VOCAB) if p[v] > kappa * max(p)]
        mass.append(row[kept].sum())
        logprob.append((row[token] / mass[-1]).log() if token in kept else row[0].log() - torch.inf)
    return torch.stack(mass), torch.stack(logprob)


def statistics(case: Case, logits: Tensor, needs: Needs) -> TokenStats:
    """What the operator would give: only what was asked for, with gradient only where that was asked for."""
    h = entropy(logits) if needs.entropy else None
    nucleus = None if needs.nucleus_p is None else nucleus_entropy(logits, needs.nucleus_p, needs.nucleus)
    mass, without = (None, None) if needs.min_p is None else without_noise(case, logits, needs.min_p)
    return TokenStats(
        min_p_mass=mass if mass is None or needs.min_p_grad else mass.detach(),
        min_p_logprob=None if without is None else without.detach(),
        logprob=case.logp(logits),
        entropy=h if h is None or needs.entropy_grad else h.detach(),
        nucleus_entropy=nucleus if nucleus is None or needs.nucleus_grad else nucleus.detach(),
    )


def batch(case: Case, method: Method) -> Batch:
    mask = ~case.reward.isnan()[case.sequence]
    num_sequences, num_tokens = len(case.valid), int(mask.sum())
    weight = token_weights(
        method.aggregation,
        case.sequence,
        mask,
        num_sequences=num_sequences,
        num_tokens=num_tokens,
        max_response_tokens=MAX_LENGTH,
    )
    rollouts = RolloutBatch(
        sequence=case.sequence,
        mask=mask,
        old_logprob=case.logp(case.old),
        rollout_logprob=case.logp(case.old),
        ref_logprob=case.logp(case.ref) if method.needs.reference else None,
        reward=case.reward,
        group=case.group,
        truncated=torch.zeros(len(case.reward), dtype=torch.bool),
        old_value=case.old_value if method.needs.value else None,
        old=statistics(case, case.old, method.needs).detach() if method.needs.old else None,
    )
    advantages = method.compute_advantages(rollouts, OneRank())
    return rollouts.complete(advantages, weight=weight.double(), num_sequences=num_sequences, num_tokens=num_tokens)


@dataclass
class Ranks:
    """Reducers that meet in a list, for ranks that are threads."""

    size: int

    def __post_init__(self) -> None:
        self.slots: list[Tensor] = [torch.empty(0)] * self.size
        self.barrier = threading.Barrier(self.size, timeout=20)

    def reducer(self, rank: int) -> Reducer:
        ranks = self

        class Member(OneRank):
            def sum(self, value: Tensor) -> Tensor:
                return torch.stack(ranks.exchange(rank, value)).sum(0)

            def concat(self, value: Tensor) -> Tensor:
                return torch.cat(ranks.exchange(rank, value))

        return Member()

    def exchange(self, rank: int, value: Tensor) -> list[Tensor]:
        self.slots[rank] = value
        self.barrier.wait()
        everyone = list(self.slots)
        self.barrier.wait()
        return everyone

    def run(self, function: Callable[[int, Reducer], Any]) -> list[Any]:
        results: list[Any] = [None] * self.size

        def member(rank: int) -> None:
            try:
                results[rank] = function(rank, self.reducer(rank))
            except BaseException as error:
                results[rank] = error
                self.barrier.abort()

        threads = [threading.Thread(target=member, args=(rank,)) for rank in range(self.size)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for result in sorted(results, key=lambda r: isinstance(r, threading.BrokenBarrierError)):
            if isinstance(result, BaseException):
                raise result
        return results


@dataclass
class Result:
    loss: float
    gradient: Tensor  # [T, V]
    plans: list[Prepared]  # one per rank
    metrics: dict[str, float]
    methods: list[Method]  # one per rank, as they are after the step
    observed: dict[str, float]
    value_loss: float
    value_gradient: Tensor  # [T]


def run(
    case: Case, method: Method | dict[str, Any], *, shares: Sequence[Sequence[int]] = WHOLE, micro_batch: int = 99
) -> Result:
    """One step of one mini-batch: groups dealt as ``shares``, micro-batches of ``micro_batch`` responses."""
    method = methods.create(method) if isinstance(method, dict) else method
    whole = batch(case, method)
    observed = replace(method.needs, entropy=True, nucleus_p=method.needs.nucleus_p or 0.8)
    old = statistics(case, case.old, observed).detach()
    stats = statistics(case, case.logits, method.needs)
    everyone = [copy.deepcopy(method) for _ in shares]

    def member(
        rank: int, reduce: Reducer
    ) -> tuple[Tensor, Prepared, list[dict[str, Tensor]], dict[str, float], Tensor]:
        own = everyone[rank]
        part, position = whole.select([i for i in range(len(case.reward)) if int(case.group[i]) in shares[rank]])
        part = replace(part, **vars(own.compute_advantages(part, reduce)))
        observed = own.on_step_start(part, old.map(lambda value: value[position]), reduce)
        needs = own.needs
        prepared = own.prepare(part, stats.detach().map(lambda v: v[position]) if needs.current else None, reduce)
        losses, metrics, value_losses = [], [], [case.value.sum() * 0]
        for start in range(0, len(part.reward), micro_batch):
            small, at = part.select(list(range(start, min(start + micro_batch, len(part.reward)))))
            given = stats.map(lambda value, at=at: value[position][at])
            losses.append(own.loss(small, given, prepared.select(at)).sum())
            metrics.append(own.metrics(small, given.detach(), prepared.select(at)))
            if own.needs.value:
                value = case.value[position][at]
                value_losses.append(own.value_loss(small, value).sum())
                metrics[-1] |= own.value_metrics(small, value.detach())
        return torch.stack(losses).sum(), prepared, metrics, observed, torch.stack(value_losses).sum()

    results = Ranks(len(shares)).run(member)
    loss = torch.stack([r[0] for r in results]).sum()
    sums = [m for r in results for m in r[2]]
    metrics = {name: float(sum(m[name].double() for m in sums)) for name in sums[0]}
    value_loss = torch.stack([r[4] for r in results]).sum()
    [value_gradient] = torch.autograd.grad(value_loss, case.value)
    plans, observed = [r[1] for r in results], results[0][3]
    return Result(
        float(loss.detach()),
        case.gradient(loss),
        plans,
        metrics,
        everyone,
        observed,
        float(value_loss.detach()),
        value_gradient,
    )


def close(found: Result, loss: Tensor, case: Case, rel: float = 1e-6) -> bool:
    """Whether loss and gradient are those of the reference, to the fp32 of the weights and advantages."""
    gradient = case.gradient(loss)
    assert gradient.norm() > 0
    error = float((found.gradient - gradient).norm() / gradient.norm())
    return abs(found.loss - float(loss)) <= rel * max(abs(float(loss)), 0.1) and error <= rel
