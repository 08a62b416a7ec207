"""The function that ``reward.function`` names, and whether it can be called with ``[reward.options]``. No torch."""

from __future__ import annotations

from collections.abc import Callable
from inspect import Parameter, signature
from typing import Any

from megatron_ext.config.errors import ConfigError
from megatron_ext.config.schema import RewardConfig
from megatron_ext.plugins import check_options, load, options_of_function


def find_reward(reward: RewardConfig) -> Callable[..., Any]:
    """The function that ``reward.function`` names, its ``[reward.options]`` checked. Raises ConfigError."""
    key, spec = "reward.function", reward.function
    try:
        function = load(spec, key=key)
        if not callable(function):
            raise ValueError(f"{key}: {spec} is {function!r}, expected a function of a problem and a response")
        taken = [p.name for p in signature(function).parameters.values() if p.kind is not Parameter.KEYWORD_ONLY]
        if len(taken) != 2:
            raise ValueError(
                f"{key}: {spec} takes ({', '.join(taken)}) before its options, expected (problem, response); options "
                "are parameters after a *"
            )
        check_options(reward.options, options_of_function(function), section="reward.options", owner=spec)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    return function
