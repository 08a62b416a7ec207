"""The method of a run, checked against the rest of its configuration."""

from __future__ import annotations

from megatron_ext import methods
from megatron_ext.methods.base import Method
from megatron_ext.train.config import Config, ConfigError


def create_method(config: Config) -> Method:
    """The method that ``config.method`` names. Raises ConfigError for its options, or if it does not fit the rest."""
    try:
        method = methods.create(config.method)
    except ValueError as error:
        raise ConfigError(str(error)) from None
    if method.group_relative and config.rollout.samples == 1:
        raise ConfigError(
            f"rollout.samples: found 1, but {config.method['name']} compares a response with the others to its prompt: "
            "a group of one has no advantage and nothing would be learnt; expected at least 2, 8 is usual"
        )
    return method
