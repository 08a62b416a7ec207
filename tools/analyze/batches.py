"""Scored responses as the batch that a method trains on, and the tokens that the method then treats apart.

What training does with one mini-batch on one rank: rewards of 1 and 0 for right and wrong responses, the method's own
advantages over groups of responses to one problem, the policy that sampled as the current one (every ratio is 1).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from megatron_ext import methods
from megatron_ext.config.errors import ConfigError
from megatron_ext.methods.base import Method, OneRank, num_valid
from megatron_ext.train.token_weights import token_weights
from megatron_ext.types import Batch, RolloutBatch, TokenStats

from .scored import Scored


def create_method(name: str, options: Sequence[str]) -> Method:
    """A method by name with options such as ``tau=0.9``. Raises ConfigError for what it does not have."""
    import tomllib

    given: dict[str, Any] = {}
    for option in options:
        key, equals, value = option.partition("=")
        if not equals:
            raise ConfigError(f"--method-option: found {option!r}, expected key=value, such as tau=0.9")
        try:
            given[key] = tomllib.loads(f"value = {value}")["value"]
        except tomllib.TOMLDecodeError:
            given[key] = value
    try:
        method = methods.create({"name": name, **given})
    except ValueError as error:
        raise ConfigError(f"--method: {error}") from None
    if method.needs.value:
        raise ConfigError(f"--method {name}: needs a critic's values, which a model's folder does not hold")
    return method


def groups(responses: Sequence[Scored]) -> list[list[Scored]]:
    """The responses of each problem together."""
    found: dict[tuple[str, str], list[Scored]] = {}
    for response in responses:
        found.setdefault(response.problem, []).append(response)
    return list(found.values())


def batch_of(group_list: Sequence[Sequence[Scored]], method: Method) -> tuple[Batch, TokenStats]:
    """Whole groups as one mini-batch, and its statistics ``[T]``, fp32. Responses that were not scored do not train."""
    responses = [response for group in group_list for response in group]
    group = [number for number, members in enumerate(group_list) for _ in members]
    parts = [response.stats for response in responses]
    assert all(part is not None for part in parts)
    names = parts[0].present() if parts[0] is not None else {}
    stats = TokenStats(**{name: torch.cat([part.present()[name] for part in parts if part]) for name in names})
    lengths = torch.tensor([len(response.texts) for response in responses])
    sequence = torch.repeat_interleave(torch.arange(len(responses)), lengths)
    reward = torch.tensor([float("nan") if r.correct is None else float(r.correct) for r in responses])
    rollouts = RolloutBatch(
        sequence=sequence,
        mask=~reward.isnan()[sequence],
        old_logprob=stats.logprob,
        rollout_logprob=stats.logprob,
        ref_logprob=stats.logprob,
        reward=reward,
        group=torch.tensor(group),
        truncated=torch.tensor([response.truncated for response in responses]),
        old=stats if method.needs.old else None,
    )
    num_sequences, num_tokens = num_valid(rollouts), int(rollouts.mask.sum())
    weight = token_weights(
        method.aggregation,
        sequence,
        rollouts.mask,
        num_sequences=num_sequences,
        num_tokens=num_tokens,
        max_response_tokens=int(lengths.max()),
    )
    advantages = method.compute_advantages(rollouts, OneRank())
    return rollouts.complete(advantages, weight=weight, num_sequences=num_sequences, num_tokens=num_tokens), stats


def selections(responses: Sequence[Scored], method: Method, prompts: int | None) -> tuple[list[Scored], dict[str, Any]]:
    """The responses in order of their groups, and for each of the method's sets its tokens ``[T]`` bool.

    ``prompts`` is the number of groups of a mini-batch, over which the method's statistics are; None: all.
    Raises ConfigError for a method that treats all tokens alike.
    """
    every = groups(responses)
    size = prompts or len(every)
    found: dict[str, list[torch.Tensor]] = {}
    for start in range(0, len(every), size):
        batch, stats = batch_of(every[start : start + size], method)
        for name, chosen in method.selections(batch, stats, OneRank()).items():
            found.setdefault(name, []).append(chosen & batch.mask)
    if not found:
        able = [name for name, cls in methods.METHODS.items() if cls.selections is not Method.selections]
        raise ConfigError(
            f"--method: {type(method).__name__} treats all tokens alike; expected one of {', '.join(able)}"
        )
    ordered = [response for group in every for response in group]
    return ordered, {name: torch.cat(parts).numpy() for name, parts in found.items()}
