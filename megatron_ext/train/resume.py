"""A run that goes on from its newest checkpoint, and what of its configuration may have changed since."""

from __future__ import annotations

from typing import Any

from megatron_ext.checkpoint.checkpoint import LoadedState, set_rng
from megatron_ext.checkpoint.manifest import differing_keys
from megatron_ext.config.errors import ConfigError
from megatron_ext.config.loading import with_defaults
from megatron_ext.train.messages import tell
from megatron_ext.train.trainer import Trainer

FREE = (  # keys a resumed run may change one by one, besides whole sections
    *("optimizer.decay_steps", "critic.decay_steps"),  # what follows from them may not: checkpoint.py::_check_schedule
    *("train.steps", "train.micro_batch_tokens", "train.share_prompts", "train.max_bad_steps", "train.hang_minutes"),
    "name",
    *("rollout.batch_size", "rollout.tensor_parallel_size", "rollout.gpu_memory_utilization", "rollout.enforce_eager"),
    "rollout.model_runner",
    *("model.fused_head", "model.offload_reference", "model.offload_optimizer", "model.recompute"),
    *("data.strict", "data.max_left_out", "data.skip_unparsable_gold"),
    *("reward.workers", "reward.deadline_s", "reward.max_timeout_share"),
)
FREE_SECTIONS = (
    *("parallel.", "checkpoint.", "validation.", "log.", "alarms.", "rollout.servers.", "model.fusions."),
    *("data.train", "data.curriculum", "data.hub", "model.path", "model.hub", "model.weights"),
)


def check_resume(saved: dict[str, Any], current: dict[str, Any]) -> None:
    """Refuse to continue a run whose results would no longer be one run's. Layout, length and speed may change.

    A key that is newer than the checkpoint had its default: that is how a run without the key behaves.
    """
    changed = {
        key: values
        for key, values in differing_keys(with_defaults(saved), current).items()
        if not key.startswith(FREE_SECTIONS) and key not in FREE
    }
    if changed:
        lines = [f"  {key}: checkpoint {_short(old)}, now {_short(new)}" for key, (old, new) in changed.items()]
        raise ConfigError(
            "resume: the configuration differs from the checkpoint's; restore these keys, or start a new run "
            "with another name\n" + "\n".join(lines)
        )


def _short(value: Any) -> str:
    """A value in a message, of a chat template its beginning and its length."""
    text = repr(value)
    return text if len(text) <= 300 else f"{text[:200]}... ({len(text)} characters)"


def resume(trainer: Trainer, loaded: LoadedState) -> None:
    """Give the trainer the checkpoint's state; the random numbers last, since building it has drawn some."""
    trainer.load_state(loaded.step, loaded.state)
    for line in loaded.refused:
        tell(f"checkpoint: {line}")
    tell(f"resuming after step {loaded.step} of {trainer.config.train.steps}")
    if loaded.rng is not None:
        set_rng(loaded.rng)
