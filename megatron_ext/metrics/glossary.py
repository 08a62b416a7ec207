"""Every metric that a run writes: unit, meaning, where it is good, what to do when it is not. No torch.

The live table, the report, the alarms and docs/metrics.md take names, units and advice from here. A method describes
the metrics that it alone reports on its own page (``Method.metrics_glossary``).
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from megatron_ext.metric import Metric

CLOCK = ("time/", "speed/", "servers/")  # what depends on the machine: all others follow from configuration and seed
FINITE = (  # NaN or infinity there is an alarm; critic/explained_variance may be NaN
    *("loss/", "grad/", "critic/grad_norm", "entropy/", "logprob/", "reward/", "mismatch/"),
)

LEARNING, VALIDATION, ENTROPY, UPDATE = "Learning", "Validation", "Entropy", "Update"
CRITIC, RESPONSES, MACHINE = "Critic", "Responses", "Machine"
OF_RESPONSES, OF_GROUPS = "share of responses", "share of groups"
OF_PROBLEMS, OF_TOKENS, OF_TIME = "share of problems", "share of tokens", "share of all ranks' time"
NATS, SECONDS, SPEED = "nats per token", "seconds", "tokens per second"

METRICS = (
    Metric(
        name="reward/mean", section=LEARNING, title="Reward", unit="reward", short="reward",
        meaning="mean reward of the step's responses",
        good="rises",
        low="it stays flat: look at advantage/zero, then at the responses of the report; raise optimizer.lr if "
        "kl/old is tiny",
    ),
    Metric(
        name="reward/outcome/<outcome>", section=LEARNING, title="Outcomes", unit=OF_RESPONSES, adds_up=True,
        meaning="responses by outcome: correct, or what is wrong with the answer",
        good="correct rises; timeout, crashed and bad_gold stay at 0",
        high="no_answer: the prompt asks for no answer, or not in its answer_format, or responses are truncated. "
        "timeout: raise reward.deadline_s or lower reward.workers. bad_gold: correct the data",
    ),
    Metric(
        name="reward/nan", section=LEARNING, title="Unknown rewards", unit=OF_RESPONSES,
        meaning="responses without a reward (NaN); they do not train. A NaN of reward.function is the outcome error",
        good="0", high="look at these responses",
    ),
    Metric(
        name="advantage/zero", section=LEARNING, title="Zero advantage", unit=OF_RESPONSES,
        meaning="responses without advantage",
        good="low: every such response is generated in vain",
        high="their groups are all right or all wrong; choose other problems, more rollout.samples or "
        "rollout.dynamic_sampling = true",
    ),
    Metric(
        name="group/equal_rewards", section=LEARNING, title="Groups", unit=OF_GROUPS,
        meaning="groups whose rewards are all equal: a group-relative method learns nothing from them",
        good="low", high="see advantage/zero",
    ),
    Metric(
        name="group/solved", section=LEARNING, title="Groups", unit=OF_GROUPS,
        meaning="groups whose responses are all correct",
        high="the data are too easy: choose harder problems or rollout.dynamic_sampling = true",
    ),
    Metric(
        name="group/single", section=LEARNING, title="Groups", unit=OF_GROUPS,
        meaning="groups with fewer than two known rewards",
        good="0", high="see reward/nan",
    ),
    Metric(
        name="dynamic/kept_share", section=LEARNING, title="Dynamic sampling", unit=OF_GROUPS,
        meaning="groups whose rewards differ, of those up to the last one that the batch needed",
        low="most generation is thrown away: choose other problems or more rollout.samples",
    ),
    Metric(
        name="dynamic/all_right", section=LEARNING, title="Dynamic sampling", unit=OF_GROUPS,
        meaning="generated groups that are all correct", high="the data are too easy",
    ),
    Metric(
        name="dynamic/all_wrong", section=LEARNING, title="Dynamic sampling", unit=OF_GROUPS,
        meaning="generated groups with equal rewards that are not correct", high="the data are too hard",
    ),
    Metric(
        name="dynamic/generations", section=LEARNING, title="Rounds of generation", unit="rounds",
        meaning="rounds of generation in the step",
        good="few", high="raise rollout.oversample, or choose other problems",
    ),
    Metric(
        name="dynamic/filled", section=LEARNING, title="Filled and surplus groups", unit="groups",
        meaning="dropped groups that fill the batch after the last round",
        good="0", high="raise rollout.max_generations",
    ),
    Metric(
        name="dynamic/surplus", section=LEARNING, title="Filled and surplus groups", unit="groups",
        meaning="groups begun after the last one that the batch needed; they do not train",
        high="lower rollout.oversample",
    ),
    Metric(
        name="data/epoch", section=LEARNING, title="Epochs", unit="epochs",
        meaning="passes over the problems that are finished, all stages of a curriculum together",
    ),
    Metric(
        name="data/stage", section=LEARNING, title="Epochs", unit="stage",
        meaning="stage of the curriculum, counted from 0",
    ),
    Metric(
        name="validation/avg", section=VALIDATION, title="Validated accuracy", unit=OF_RESPONSES, short="valid",
        meaning="correct responses to the problems of validation.data: avg@samples",
        good="rises",
        low="reward/mean rises and this does not: the policy learns the training problems, or the reward, and nothing "
        "else",
    ),
    Metric(
        name="validation/pass", section=VALIDATION, title="Validated accuracy", unit=OF_PROBLEMS,
        meaning="problems with a correct response among validation.samples: pass@samples",
        good="does not fall",
        low="it falls while validation/avg rises: the policy explores less; see entropy/full",
    ),
    Metric(
        name="validation/maj", section=VALIDATION, title="Validated accuracy", unit=OF_PROBLEMS,
        meaning="problems whose most frequent answer is correct: maj@samples", good="rises",
    ),
    *(
        Metric(
            name=f"validation/{name}/<kind>", section=VALIDATION, title=f"Validated by kind: {name}", unit=unit,
            meaning=f"validation/{name} of the problems of one kind, or one file, where there are several",
        )
        for name, unit in (("avg", OF_RESPONSES), ("pass", OF_PROBLEMS), ("maj", OF_PROBLEMS))
    ),
    Metric(
        name="validation/length", section=VALIDATION, title="Validated response length", unit="tokens",
        meaning="mean length of the responses",
    ),
    Metric(
        name="validation/truncated", section=VALIDATION, title="Validated and truncated", unit=OF_RESPONSES,
        meaning="responses that reached validation.max_response_tokens",
        good="low", high="raise validation.max_response_tokens: answers are cut off",
    ),
    Metric(
        name="entropy/full", section=ENTROPY, title="Entropy", unit=NATS, short="entropy",
        meaning="mean entropy, over the whole vocabulary, of the policy that the step begins with: newer than the one "
        "that sampled the tokens where rollout/lag is above 0",
        good="neither falls to a fraction of the first step's nor rises to a multiple",
        low="the policy collapses; raise the method's entropy term or target, or lower optimizer.lr",
        high="the policy dissolves; lower the method's entropy term or target, or optimizer.lr",
    ),
    Metric(
        name="entropy/nucleus", section=ENTROPY, title="Entropy", unit=NATS, short="nucleus",
        meaning="mean entropy of the policy renormalised within its nucleus",
        good="as entropy/full; it ignores the unlikely tail",
    ),
    Metric(
        name="entropy/nucleus_size", section=ENTROPY, title="Nucleus size", unit="tokens",
        meaning="mean number of tokens that hold the nucleus' mass",
        high="the distribution becomes flat: see entropy/full",
    ),
    Metric(
        name="loss/total", section=UPDATE, title="Loss", unit="loss", short="loss",
        meaning="the minimised loss, mean over the step's updates",
        good="finite; its value says little about learning",
    ),
    Metric(
        name="grad/norm", section=UPDATE, title="Gradient norm", unit="norm", short="grad",
        meaning="global norm of the policy's gradient before clipping",
        good="steady, with rare spikes",
        high="clipped to optimizer.clip_grad; where that lasts, lower optimizer.lr",
    ),
    Metric(
        name="grad/skipped", section=UPDATE, title="Skipped updates", unit="share of updates",
        meaning="updates of the policy skipped because the gradient was not finite",
        good="0",
        high="an update with such a gradient is skipped; if it goes on, lower optimizer.lr and look at the responses "
        "in samples.jsonl",
    ),
    Metric(
        name="critic/skipped", section=UPDATE, title="Skipped updates", unit="share of updates",
        meaning="updates of the critic skipped because the gradient was not finite",
        good="0", high="lower critic.lr",
    ),
    Metric(
        name="optimizer/lr", section=UPDATE, title="Learning rate", unit="learning rate",
        meaning="learning rate of the policy",
    ),
    Metric(
        name="critic/lr", section=UPDATE, title="Learning rate", unit="learning rate",
        meaning="learning rate of the critic",
    ),
    Metric(
        name="critic/grad_norm", section=CRITIC, title="Gradient norm of the critic", unit="norm",
        meaning="global norm of the critic's gradient before clipping",
        good="steady", high="clipped to critic.clip_grad; where that lasts, lower critic.lr",
    ),
    Metric(
        name="response/length", section=RESPONSES, title="Length", unit="tokens", short="length",
        meaning="mean number of tokens of a response",
        good="changes slowly",
        low="responses collapse: look at them in the report, and at entropy/full",
        high="near rollout.max_response_tokens: see response/truncated",
    ),
    Metric(
        name="prompt/length", section=RESPONSES, title="Length of prompts", unit="tokens",
        meaning="mean number of tokens of the responses' prompts",
    ),
    Metric(
        name="response/truncated", section=RESPONSES, title="Truncated", unit=OF_RESPONSES, short="cut",
        meaning="responses that reached rollout.max_response_tokens",
        good="low",
        high="raise rollout.max_response_tokens; if the responses repeat themselves, see entropy/full",
    ),
    Metric(
        name="logprob/mean", section=RESPONSES, title="Log-probability", unit=NATS,
        meaning="mean log-prob of the sampled tokens under the policy that the step begins with: the one that sampled "
        "them where rollout/lag is 0",
        good="near minus entropy/full (where sampling leaves no token out)",
        low="sampled tokens are less likely than the policy says: see mismatch/mean",
    ),
    Metric(
        name="mismatch/mean", section=RESPONSES, title="Mismatch", unit=NATS,
        meaning="mean |log-prob of the rollout engine - log-prob of the trainer| over the same tokens",
        good="near 0, of the size of rounding in model.dtype (unless rollout.sampling_replay is off under a top-p, "
        "top-k or min-p)",
        high="the engine samples from other weights or in too low a precision: try model.dtype = float32, or "
        "importance.mode; above alarms.mismatch the run stops. Where rollout/lag is above 0 it holds how far the "
        "policy has moved since, and stops nothing",
    ),
    Metric(
        name="mismatch/max", section=RESPONSES, title="Mismatch", unit=NATS,
        meaning="the largest such difference of one token", high="see mismatch/mean; single tokens are harmless",
    ),
    Metric(
        name="mismatch/ratio", section=RESPONSES, title="Probability ratio", unit="ratio",
        meaning="mean probability ratio, trainer to engine, of the sampled tokens",
        good="1", low="see mismatch/mean", high="see mismatch/mean",
    ),
    Metric(
        name="rollout/lag", section=RESPONSES, title="Lag", unit="steps",
        meaning="training steps by which the policy that the step begins with is newer than the one that sampled its "
        "batch; reported under rollout.max_lag",
        good="rollout.max_lag; less at the beginning, where the first weights sample several batches",
    ),
    Metric(
        name="routing/differing", section=RESPONSES, title="Experts", unit="share of tokens and layers",
        meaning="(token, layer) pairs of prompts and responses where the engine's experts are not the trainer's own "
        "top-k; under rollout.routing_replay, which alone measures it, the trainer takes the engine's",
        good="low: without the replay, each such token would train through other experts than sampled it",
        high="the engine computes in a lower precision than the trainer, or samples from other weights: see "
        "mismatch/mean",
    ),
    Metric(
        name="routing/unknown", section=RESPONSES, title="Experts", unit="share of tokens",
        meaning="tokens that the engine read and whose experts it did not tell: the trainer takes its own",
        good="0", high="the engine loses them: see its output",
    ),
    Metric(
        name="importance/weight", section=RESPONSES, title="Importance weight", unit="weight",
        meaning="mean weight that importance.mode gives the policy loss of a token",
        good="near 1", low="much is masked, or the engine overrates what it samples: see mismatch/mean",
    ),
    Metric(
        name="importance/truncated", section=RESPONSES, title="Corrected tokens", unit=OF_TOKENS,
        meaning="tokens whose ratio, trainer to engine, is above importance.cap and was cut off there",
        good="a few percent at most", high="see mismatch/mean",
    ),
    Metric(
        name="importance/masked", section=RESPONSES, title="Corrected tokens", unit=OF_TOKENS,
        meaning="tokens without policy loss: their ratio, trainer to engine, is outside 1 / importance.cap to "
        "importance.cap",
        good="a few percent at most", high="see mismatch/mean",
    ),
    Metric(
        name="support/size", section=RESPONSES, title="Support", unit="tokens",
        meaning="mean number of tokens of the vocabulary that the sampler kept, under sampling replay",
        low="near 1: rollout.top_k, rollout.top_p or rollout.min_p leave hardly a choice, and little is learnt",
        high="the distribution becomes flat: see entropy/full",
    ),
    *(
        Metric(
            name=f"support/{name}", section=RESPONSES, title="Kept tokens", unit="share of tokens",
            meaning=meaning, good=good, low=low, high=high,
        )
        for name, meaning, good, low, high in (
            (
                "outside", "sampled tokens that were not among those that the sampler kept; they were put there",
                "0 where support/recorded is 1, else rare: rounding at the edge", "",
                "engine and trainer restrict differently, or see mismatch/mean; rollout.sampling_replay = off trains "
                "on the whole policy",
            ),
            (
                "recorded", "tokens for which the engine recorded what the sampler kept; the trainer recomputes others",
                "1 for rollout.engine hf", "the engine cannot tell: see support/outside", "",
            ),
        )
    ),
    Metric(
        name="response/unknown_logprobs", section=RESPONSES, title="Unknown log-probs", unit="tokens per response",
        meaning="sampled tokens whose log-prob the engine does not report (NaN or infinite)",
        good="0",
        high="above alarms.unknown_logprobs of the tokens the run stops; try model.dtype = float32",
    ),
    *(
        Metric(name=f"time/{phase}_s", section=MACHINE, title="Time", unit=SECONDS, adds_up=True, meaning=meaning)
        for phase, meaning in {
            "sync": "sending the weights to the rollout engine",
            "rollout": "generation, until all ranks have their responses; beside training, what the run waited for it",
            "reward": "verification of the answers that were not scored during generation",
            "validation": "validation: sending the weights, generation and verification",
            "old_logprob": "forward passes before the first update: old policy, reference, critic",
            "critic": "updates of the critic",
            "update": "updates of the policy",
            "save": "what training waited for checkpoints",
        }.items()
    ),
    Metric(
        name="time/step_s", section=MACHINE, title="Time of a step", unit=SECONDS, short="seconds",
        meaning="the whole step",
        high="see which phase of time/ grew; data/imbalance and response/length say why",
    ),
    Metric(
        name="time/idle/<phase>", section=MACHINE, title="Idle ranks", unit=OF_TIME, good="near 0",
        meaning="what ranks would wait if they met at the end of the phase: 1 - mean / longest of their work in it; "
        "missing for the rollout while a later one is generated beside the step",
        high="of update and old_logprob: see data/imbalance. Of rollout: some ranks' responses are longer",
    ),
    Metric(
        name="time/idle/step", section=MACHINE, title="Idle ranks", unit=OF_TIME, good="near 0",
        meaning="what ranks waited for one another", high="the report's timeline shows who waits for whom",
    ),
    Metric(
        name="time/rollout_background_s", section=MACHINE, title="Time of a rollout beside training", unit=SECONDS,
        meaning="generation and verification of a later step's batch while this step trains; of it time/rollout_s is "
        "what the run waited for, the rest is hidden",
        good="less than the updates take", high="more servers: rollout.servers.num",
    ),
    Metric(
        name="time/save_background_s", section=MACHINE, title="Time of a save", unit=SECONDS,
        meaning="writing a checkpoint during training; it overlaps with the other phases",
        good="less than checkpoint.every steps take",
    ),
    *(
        Metric(name=f"speed/{phase}_tokens_per_s", section=MACHINE, title="Speed", unit=SPEED, meaning=meaning)
        for phase, meaning in {
            "rollout": "generated tokens per second of time/rollout_s without its waits, of one model-parallel group",
            "rollout_background": "the same of time/rollout_background_s",
            "old_logprob": "response tokens per second of time/old_logprob_s, of one data-parallel rank",
            "update": "response tokens per second of time/update_s, of one data-parallel rank",
            "critic": "response tokens per second of time/critic_s, of one data-parallel rank",
        }.items()
    ),
    Metric(
        name="speed/dropped_responses", section=MACHINE, title="Dropped responses", unit="responses",
        meaning="responses under dynamic sampling that were given up before they were finished, since the batch was "
        "complete without them; how many is up to the clock, the batch is not",
        high="lower rollout.oversample",
    ),
    Metric(
        name="data/imbalance", section=MACHINE, title="Imbalance", unit="ratio",
        meaning="work of the busiest data-parallel rank, as operations of a forward, over the mean of all",
        good="near 1", high="more prompts per data-parallel rank: raise train.mini_batch_prompts",
    ),
    Metric(
        name="servers/restarts", section=MACHINE, title="vLLM servers", unit="since the start",
        meaning="restarts of vLLM servers", good="0",
        high="see the servers' logs in the run's folder; above rollout.servers.max_restarts the run stops",
    ),
    Metric(
        name="servers/failed", section=MACHINE, title="vLLM servers", unit="since the start",
        meaning="requests whose server failed; they were repeated", good="0", high="see servers/restarts",
    ),
    Metric(
        name="servers/stale", section=MACHINE, title="vLLM servers", unit="since the start",
        meaning="requests answered with old weights; they were repeated", good="0", high="see servers/restarts",
    ),
    Metric(
        name="vllm/model_runner", section=MACHINE, title="vLLM's model runner", unit="version",
        meaning="1 for V1, 2 for V2",
    ),
    *(
        Metric(
            name=f"alarm/{name}", section=MACHINE, title="Alarms", unit="0 or 1", meaning=f"1 while {meaning}",
            good="0", high=high,
        )
        for name, meaning, high in (
            ("entropy_low", "entropy/full is below alarms.entropy_floor x the first step's", "see entropy/full"),
            ("entropy_high", "entropy/full is above alarms.entropy_ceiling x the first step's", "see entropy/full"),
            ("not_finite", "a loss, gradient, entropy, log-prob or reward is NaN or infinite", "see grad/skipped"),
            ("zero_advantage", "advantage/zero is above alarms.zero_advantage_share", "see advantage/zero"),
        )
    ),
    Metric(
        name="alarm/begun", section=MACHINE, title="Alarms begun", unit="since the start",
        meaning="alarms that have begun", good="0", high="the run's output says which, when and what to do",
    ),
)  # fmt: skip


class Glossary:
    """The trainer's metrics and those that a method describes (``own``). Raises ValueError for a name twice."""

    def __init__(self, own: Iterable[Metric] = ()):
        self.metrics = (*METRICS, *own)
        self._exact = {metric.name: metric for metric in self.metrics if "<" not in metric.name}
        self._families = [(_pattern(metric.name), metric) for metric in self.metrics if "<" in metric.name]
        if len(self._exact) + len(self._families) < len(self.metrics):
            names = [metric.name for metric in self.metrics]
            raise ValueError(f"metrics described twice: {', '.join(sorted({n for n in names if names.count(n) > 1}))}")

    def find(self, name: str) -> Metric | None:
        """The description of a key of ``metrics.jsonl``; None for an unknown one."""
        families = (metric for pattern, metric in self._families if pattern.fullmatch(name))
        return self._exact.get(name) or next(families, None)

    def require(self, name: str) -> Metric:
        """The description of a key that must have one. Raises ValueError for another."""
        if (metric := self.find(name)) is None:
            raise ValueError(
                f"metrics: nothing describes {name}; add it to METRICS in metrics/glossary.py, or to metrics_glossary "
                "on the page of the method that reports it"
            )
        return metric


def _pattern(name: str) -> re.Pattern[str]:
    """Of the names of a family: each ``<part>`` stands for one part of a name."""
    return re.compile(
        "".join("[^/]+" if part.startswith("<") else re.escape(part) for part in re.split("(<.*?>)", name))
    )


GLOSSARY = Glossary()
