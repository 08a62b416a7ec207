"""Keys that a recipe sets and that nothing of its run reads: told when it starts, and by its dry run.

They are no faults: whoever switches something off for a comparison should not have to remove what belongs to it.
"""

from __future__ import annotations

from collections.abc import Set

from megatron_ext.config.schema import Config, CriticConfig
from megatron_ext.methods.base import Method
from megatron_ext.rollout.registry import ENGINES, find_engine


def without_effect(config: Config, method: Method) -> list[str]:
    """A line for each of them that is not at its default."""
    rollout, steps = config.rollout, config.train.steps
    of_engines = {key for engine in ENGINES.values() for key in engine.keys}
    unread = (  # section, keys, whether something reads them, what is said if not
        ("validation", {"data"}, config.validation.every, "validation.every is 0"),
        ("rollout", {"oversample"}, rollout.dynamic_sampling, "rollout.dynamic_sampling is off"),
        ("importance", {"cap", "level"}, config.importance.mode != "off", "importance.mode is off"),
        (
            "rollout",
            of_engines - {*find_engine(rollout).keys},
            False,
            f"rollout.engine {rollout.engine} does not read it",
        ),
        ("critic", CriticConfig.model_fields.keys(), method.needs.value, f"{config.method['name']} has no critic"),
    )
    lines = [
        f"{section}.{key}: {why}"
        for section, keys, is_read, why in unread
        if not is_read
        for key in _changed(config, section, keys)
    ]
    if rollout.max_lag >= steps:
        lines.append(f"rollout.max_lag: {rollout.max_lag} of {steps} steps: the first weights sample every batch")
    if config.data.stage_starts and config.data.stage_starts[-1] >= steps:
        lines.append(f"data.stage_starts: stages after {steps} steps, train.steps, do not begin")
    longest = rollout.max_response_tokens
    if method.overlong is not None and longest <= method.overlong[0]:
        lines.append(f"method.overlong_max: {method.overlong[1]}: no response of {longest} tokens is too long")
    o = config.optimizer
    updates = method.policy_steps(steps) * (config.updates_per_step if o.step_unit == "update" else 1)
    if o.schedule == "constant" and o.warmup_steps >= updates:
        lines.append(
            f"optimizer.lr: is not reached: the run has {updates} {o.counted}, optimizer.warmup_steps is "
            f"{o.warmup_steps}"
        )
    return lines


def _changed(config: Config, section: str, keys: Set[str]) -> list[str]:
    """Those that differ from their default, in the section's order."""
    own = getattr(config, section)
    return [
        key
        for key, field in type(own).model_fields.items()
        if key in keys and getattr(own, key) != field.get_default(call_default_factory=True)
    ]
