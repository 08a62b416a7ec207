"""The method of a run, checked against the rest of its configuration."""

from __future__ import annotations

from megatron_ext import methods
from megatron_ext.config.aliases import find, renamed_values
from megatron_ext.config.errors import ConfigError
from megatron_ext.config.schema import Config, OptimizerConfig
from megatron_ext.methods.base import Method, Needs
from megatron_ext.plan.memory import Roles
from megatron_ext.plugins import options_of_class


def create_method(config: Config) -> Method:
    """The method that ``config.method`` names. Raises ConfigError for its options, or if it does not fit the rest."""
    try:
        known = options_of_class(methods.find(config.method.get("name")))
        foreign = {key: ours for key in config.method if key not in known and (ours := find(key))}
        if foreign:
            raise ValueError(
                "\n".join(f"method.{key}: unknown option; here it is {ours}" for key, ours in foreign.items())
            )
        if renamed := renamed_values(config.method):
            raise ValueError("\n".join(f"method.{key}: {old!r} is called {new!r} now" for key, old, new in renamed))
        method = methods.create(config.method)
    except ValueError as error:
        raise ConfigError(str(error)) from None
    if method.group_relative and config.rollout.samples == 1:
        raise ConfigError(
            f"rollout.samples: found 1, but {config.method['name']} compares a response with the others to its prompt: "
            "a group of one has no advantage and nothing would be learnt; expected at least 2, 8 is usual"
        )
    if method.trains_on_wrong_rewards and config.reward.wrong >= 0:
        raise ConfigError(
            f"reward.wrong: found {config.reward.wrong}, but this {config.method['name']} takes a wrong response's "
            "reward for its advantage, and would learn nothing from it; expected a number below 0, -1 in the authors' "
            "runs"
        )
    longest = config.rollout.max_response_tokens
    if method.overlong is not None and method.overlong[1] < longest:
        raise ConfigError(
            f"method.overlong_max: {method.overlong[1]}, but responses may have rollout.max_response_tokens = {longest}"
            " tokens, and the penalty grows beyond -1 behind it; set them to the same number"
        )
    for section, options in optimizers(config, method).items():
        if options.schedule != "constant" and options.decay_steps <= options.warmup_steps:
            raise ConfigError(
                f"{section}.warmup_steps: {options.warmup_steps} {options.counted} of warm-up leave nothing to the "
                f"decay, which ends after {options.decay_steps} (the run's, unless {section}.decay_steps says so); "
                f'lower it, or set {section}.schedule = "constant"'
            )
    return method


def measures_old_in_update(config: Config, needs: Needs) -> bool:
    """Whether nothing needs the statistics of the first mini-batch before its update, whose forward has them."""
    return not (needs.old or needs.current or needs.value or config.importance.mode != "off")


def roles_of(config: Config, needs: Needs) -> Roles:
    """The models and passes of a step, for the planner."""
    waits = needs.reference and config.rollout.replays_sampling  # for what the sampler kept, where the engine is silent
    old = waits or not measures_old_in_update(config, needs)
    return Roles(reference=needs.reference, critic=needs.value, current=needs.current, old=old)


def optimizers(config: Config, method: Method) -> dict[str, OptimizerConfig]:
    """The options of each model that trains, by their section, ``decay_steps`` filled in."""
    steps = config.train.steps
    trained = {"optimizer": (config.optimizer, method.policy_steps(steps))}
    if method.needs.value:
        trained["critic"] = (config.critic, steps)
    per_step = {"update": config.updates_per_step, "rollout": 1}
    return {
        section: options.with_decay_steps(steps * per_step[options.step_unit])
        for section, (options, steps) in trained.items()
    }
