"""All methods by name, and how a recipe's ``[method]`` table becomes one."""

from __future__ import annotations

from typing import Any

from megatron_ext.methods.aec import AEC
from megatron_ext.methods.aer import AER
from megatron_ext.methods.base import Method
from megatron_ext.methods.ce_gppo import CEGPPO
from megatron_ext.methods.clip_cov import ClipCov
from megatron_ext.methods.clip_higher import ClipHigher
from megatron_ext.methods.dmmpt import DMMPT
from megatron_ext.methods.dr_grpo import DrGRPO
from megatron_ext.methods.entrocraft import Entrocraft
from megatron_ext.methods.entropic import EntroPIC
from megatron_ext.methods.entropy_advantage import EntropyAdvantage, PPOEntropyAdvantage
from megatron_ext.methods.entropy_bonus import EntropyBonus
from megatron_ext.methods.erc import ERC
from megatron_ext.methods.forking_tokens import ForkingTokens
from megatron_ext.methods.grpo import GRPO
from megatron_ext.methods.high_entropy_reward import HighEntropyReward
from megatron_ext.methods.kl_cov import KLCov
from megatron_ext.methods.lp_reg import LpReg
from megatron_ext.methods.mai_clip import MAIClip
from megatron_ext.methods.ppo import PPO
from megatron_ext.methods.qae import QAE
from megatron_ext.methods.repo import ADAPO, REPO
from megatron_ext.methods.sent import SENT
from megatron_ext.methods.siren import SIREN
from megatron_ext.methods.steer import STEER
from megatron_ext.methods.w_reinforce import NSR, PSR, WReinforce
from megatron_ext.plugins import check_options, is_spec, load, options_of_class, suggest

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
    "ce_gppo": CEGPPO,
    "erc": ERC,
    "lp_reg": LpReg,
    "steer": STEER,
    "adapo": ADAPO,
    "entrocraft": Entrocraft,
    "mai_clip": MAIClip,
    "qae": QAE,
    "repo": REPO,
}


def find(name: Any) -> type[Method]:
    """The class that ``method.name`` names: one of METHODS, or ``package.module:Name`` of the user's own.

    Raises ValueError.
    """
    if not isinstance(name, str) or (name not in METHODS and not is_spec(name)):
        raise ValueError(f"method.name: unknown method {name!r}; {suggest(str(name), METHODS)}")
    if name in METHODS:
        return METHODS[name]
    cls = load(name, key="method.name")
    if not isinstance(cls, type) or not issubclass(cls, Method):
        raise ValueError(
            f"method.name: {name} is {cls!r}, expected a class derived from megatron_ext.methods.base.Method or from "
            "one of its methods, such as megatron_ext.methods.grpo.GRPO"
        )
    if "__dataclass_params__" not in vars(cls):  # its fields would be no options
        raise ValueError(f"method.name: {name} is no dataclass of its own; write @dataclass(kw_only=True) above it")
    return cls


def create(options: dict[str, Any]) -> Method:
    """The method of a recipe's ``[method]`` table: ``name`` and the options that differ from its defaults.

    Raises ValueError for an unknown method or option, or a value of the wrong type or range.
    """
    given = {key: value for key, value in options.items() if key != "name"}
    cls = find(options.get("name"))
    check_options(given, options_of_class(cls), section="method", owner=options["name"])
    try:
        return cls(**given)
    except ValueError as error:
        raise ValueError("\n".join(f"method.{line}" for line in str(error).splitlines())) from None
