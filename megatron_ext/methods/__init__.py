"""All methods by name, and how a recipe's ``[method]`` table becomes one."""

from __future__ import annotations

import difflib
from dataclasses import fields
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from megatron_ext.methods.aec import AEC
from megatron_ext.methods.aer import AER
from megatron_ext.methods.base import Method
from megatron_ext.methods.clip_cov import ClipCov
from megatron_ext.methods.clip_higher import ClipHigher
from megatron_ext.methods.dmmpt import DMMPT
from megatron_ext.methods.dr_grpo import DrGRPO
from megatron_ext.methods.entropic import EntroPIC
from megatron_ext.methods.entropy_advantage import EntropyAdvantage, PPOEntropyAdvantage
from megatron_ext.methods.entropy_bonus import EntropyBonus
from megatron_ext.methods.forking_tokens import ForkingTokens
from megatron_ext.methods.grpo import GRPO
from megatron_ext.methods.high_entropy_reward import HighEntropyReward
from megatron_ext.methods.kl_cov import KLCov
from megatron_ext.methods.ppo import PPO
from megatron_ext.methods.sent import SENT
from megatron_ext.methods.siren import SIREN
from megatron_ext.methods.w_reinforce import NSR, PSR, WReinforce

METHODS: dict[str, type[Method]] = {
    "grpo": GRPO,
    "dr_grpo": DrGRPO,
    "clip_higher": ClipHigher,
    "ppo": PPO,
    "entropy_bonus": EntropyBonus,
    "high_entropy_reward": HighEntropyReward,
    "clip_cov": ClipCov,
    "kl_cov": KLCov,
    "forking_tokens": ForkingTokens,
    "nsr": NSR,
    "psr": PSR,
    "w_reinforce": WReinforce,
    "aec": AEC,
    "dmmpt": DMMPT,
    "siren": SIREN,
    "aer": AER,
    "entropy_advantage": EntropyAdvantage,
    "entropy_advantage_ppo": PPOEntropyAdvantage,
    "entropic": EntroPIC,
    "sent": SENT,
}


def create(options: dict[str, Any]) -> Method:
    """The method of a recipe's ``[method]`` table: ``name`` and the options that differ from its defaults.

    Raises ValueError for an unknown method or option, or a value of the wrong type or range.
    """
    options = dict(options)
    name = options.pop("name", None)
    if not isinstance(name, str) or name not in METHODS:
        raise ValueError(f"method.name: unknown method {name!r}; {_suggest(str(name), list(METHODS))}")
    cls = METHODS[name]
    hints = get_type_hints(cls)
    known = [field.name for field in fields(cls) if field.init]
    for key, value in options.items():
        if key not in known:
            raise ValueError(f"method.{key}: {name} has no such option; {_suggest(key, known)}")
        if not _fits(value, hints[key]):
            raise ValueError(f"method.{key}: found {value!r}, expected {_describe(hints[key])}")
    try:
        return cls(**options)
    except ValueError as error:
        raise ValueError(f"method.{error}") from None


def _suggest(word: str, known: list[str]) -> str:
    close = difflib.get_close_matches(word, known, n=1)
    return f"did you mean {close[0]}?" if close else f"expected one of {', '.join(sorted(known))}"


def _fits(value: Any, hint: Any) -> bool:
    if get_origin(hint) is Literal:
        return value in get_args(hint)
    if get_origin(hint) in (Union, UnionType):
        return any(_fits(value, part) for part in get_args(hint))
    if hint is NoneType:
        return value is None
    if hint is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    return type(value) is hint


def _describe(hint: Any) -> str:
    if get_origin(hint) is Literal:
        return "one of " + ", ".join(repr(choice) for choice in get_args(hint))
    if get_origin(hint) in (Union, UnionType):
        return " or ".join(_describe(part) for part in get_args(hint))
    return "nothing" if hint is NoneType else f"a value of type {hint.__name__}"
