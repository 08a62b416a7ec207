"""Keys that a recipe sets and that nothing of its run reads: told when it starts, and by its dry run.

They are no faults: whoever switches something off for a comparison should not have to remove what belongs to it.
"""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel

from megatron_ext.config.schema import Config
from megatron_ext.methods.base import Method
from megatron_ext.rollout.registry import ENGINES, find_engine


def without_effect(config: Config, method: Method) -> list[str]:
    """A line for each of them that is not at its default."""
    rollout, steps = config.rollout, config.train.steps
    lines = [
        f"validation.data: nothing is validated: validation.every is 0 ({len(config.validation.data)} files)"
        for _ in _changed(config.validation, "data")
        if not config.validation.every
    ]
    if not rollout.dynamic_sampling:
        lines += [
            f"rollout.{key}: is of rollout.dynamic_sampling, which is off" for key in _changed(rollout, "oversample")
        ]
    if config.importance.mode == "off":
        lines += [f"importance.{key}: importance.mode is off" for key in _changed(config.importance, "cap", "level")]
    engine = find_engine(rollout)
    unread = {key for each in ENGINES.values() for key in each.keys} - set(engine.keys)
    lines += [f"rollout.{key}: rollout.engine {rollout.engine} does not read it" for key in _changed(rollout, *unread)]
    if not method.needs.value and (changed := _changed(config.critic, *type(config.critic).model_fields)):
        lines.append(f"critic.{', critic.'.join(changed)}: {config.method['name']} has no critic")
    if rollout.max_lag >= steps:
        lines.append(f"rollout.max_lag: {rollout.max_lag} of {steps} steps: the first weights sample every batch")
    if config.data.stage_starts and config.data.stage_starts[-1] >= steps:
        lines.append(f"data.stage_starts: stages after {steps} steps, train.steps, do not begin")
    overlong = getattr(method, "overlong_max", None)
    if overlong is not None and rollout.max_response_tokens <= overlong - getattr(method, "overlong_buffer"):  # noqa: B009
        lines.append(
            f"method.overlong_max: {overlong}: no response of {rollout.max_response_tokens} tokens is too long"
        )
    o = config.optimizer
    updates = method.policy_steps(steps) * (config.updates_per_step if o.step_unit == "update" else 1)
    if o.schedule == "constant" and o.warmup_steps >= updates:
        lines.append(
            f"optimizer.lr: is not reached: the run has {updates} {o.counted}, optimizer.warmup_steps is "
            f"{o.warmup_steps}"
        )
    return lines


def _changed(section: BaseModel, *keys: str) -> list[str]:
    """Those that differ from their default, in the section's order."""
    fields: dict[str, Any] = type(section).model_fields
    return [
        key
        for key, field in fields.items()
        if key in keys and getattr(section, key) != field.get_default(call_default_factory=True)
    ]
