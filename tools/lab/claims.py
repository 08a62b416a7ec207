"""What the papers say about entropy, and whether it shows in the lab: decided by a rule from the runs, never by hand.

A rule is asked once per seed (runs of one seed see the same problems in the same order) and a claim *shows* when it
holds in every seed, shows *in some* when in one at least, and otherwise *does not show*. "Late" means the last third
of the steps. Entropy is the mean of a step's response tokens over the whole vocabulary, in nats.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ..tiny.tabular import Curve
from .results import Result, Results

ENTROPY, AVG = "entropy/full", "avg@"
COLLAPSE = 0.6  # of the first step's entropy: 40 % below it
HOLDS = {"siren": 0.2, "aer": 0.2, "entropic": 0.1}  # distance to the target that still counts as held


@dataclass(frozen=True)
class Claim:
    """A claim with its verdict. ``holds`` is per seed; empty when its runs are not finished."""

    paper: str
    text: str
    rule: str
    measured: str
    holds: tuple[bool, ...]

    @property
    def verdict(self) -> str:
        if not self.holds:
            return "not run"
        count = f" ({sum(self.holds)}/{len(self.holds)} seeds)" if len(self.holds) > 1 else ""
        return ("shows" if all(self.holds) else "in some" if any(self.holds) else "does not show") + count


def claims(results: Results, table: dict[str, Curve]) -> list[Claim]:
    """Every claim, in the order of the page."""
    found = [
        *_collapse(results),
        *_held(results),
        *_entropic(results),
        *_tabular(table),
        *_comparisons(results),
        *_kept(results),
    ]
    return found


def _collapse(results: Results) -> list[Claim]:
    def fallen(run: Result) -> list[float]:
        return [late / first for late, first in zip(run.late(ENTROPY), run.first(ENTROPY), strict=True)]

    def alarm(run: Result) -> list[float]:
        return run.late("alarm/entropy_high") or [0.0] * len(run.seeds)

    return [
        _claim(
            results, "SIREN, AER, EntroPIC", "GRPO's entropy collapses", ["grpo"],
            f"late entropy at most {COLLAPSE:.0%} of the first step's",
            lambda run: [value <= COLLAPSE for value in fallen(run)],
            lambda run: f"late / first {_spread(fallen(run))}",
        ),
        _claim(
            results, "SIREN, AER", "a constant bonus that is large enough explodes, and the alarm says so",
            ["entropy_bonus_large"], "late entropy above the first step's, alarm entropy_high lasting at the end",
            lambda run: [late > first and lasting > 0.99 for late, first, lasting in zip(
                run.late(ENTROPY), run.first(ENTROPY), alarm(run), strict=True)],
            lambda run: f"late entropy {_spread(run.late(ENTROPY))}, late reward {_spread(run.late('reward/mean'))}",
        ),
    ]  # fmt: skip


def _held(results: Results) -> list[Claim]:
    found = []
    for method, paper, anchor in (
        ("siren", "SIREN", "keeps its peak entropy at the anchor"),
        ("aer", "AER", "keeps the entropy at tau H_0"),
    ):
        found.append(
            _claim(
                results, paper, f"{method} {anchor}", [method],
                f"late mean within {HOLDS[method]:.0%} of it",
                lambda run, method=method: [abs(value) <= HOLDS[method] for value in run.distance],
                lambda run: f"distance {_percent(run.distance)}",
            )
        )  # fmt: skip
    return found


ENTROPIC = "EntroPIC"


def pi_run(place: str, start: str) -> str:
    """The plan's name of PI control ``on`` or ``off`` policy, from a start ``above`` or ``below`` the target."""
    return "entropic" if (place, start) == ("off", "above") else f"entropic_pi_{place}_{start}"


def _entropic(results: Results) -> list[Claim]:
    found = []
    for place in ("on", "off"):
        for start in ("above", "below"):
            found.append(
                _claim(
                    results, ENTROPIC, f"PI control holds its target {place}-policy, from {start}",
                    [pi_run(place, start)], f"late entropy within {HOLDS['entropic']:.0%} of the target",
                    lambda run: [abs(value) <= HOLDS["entropic"] for value in run.distance],
                    _distance_and_output,
                )
            )  # fmt: skip
    for place in ("on", "off"):
        for start in ("above", "below"):
            found.append(_integral(results, place, start))
    for name, text in (
        ("entropic_paper", "the paper's threshold .95 holds it too"),
        ("entropic_full", "the full form holds it too"),
    ):
        found.append(
            _claim(
                results, ENTROPIC, text, [name], f"late entropy within {HOLDS['entropic']:.0%} of the target",
                lambda run: [abs(value) <= HOLDS["entropic"] for value in run.distance], _distance_and_output,
            )
        )  # fmt: skip
    return found


def _integral(results: Results, place: str, start: str) -> Claim:
    text = {
        "on": f"on-policy P control alone holds the target, from {start}",
        "off": f"off-policy P control alone leaves an error that the integral removes, from {start}",
    }[place]
    limit = HOLDS["entropic"]

    def rule(p: Result, pi: Result) -> list[bool]:
        if place == "on":
            return [abs(value) <= limit for value in p.distance]
        return [abs(a) > limit >= abs(b) for a, b in zip(p.distance, pi.distance, strict=True)]

    said = {"on": f"P: late entropy within {limit:.0%} of the target", "off": f"P further than {limit:.0%}, PI within"}
    return _claim(
        results, ENTROPIC, text, [f"entropic_p_{place}_{start}", pi_run(place, start)], said[place], rule,
        lambda p, pi: f"P {_percent(p.distance)}, PI {_percent(pi.distance)}",
    )  # fmt: skip


def _tabular(table: dict[str, Curve]) -> list[Claim]:
    """The theorems on the exact table: one run each, so one verdict."""

    def error(name: str) -> float:
        return table[name].error / table[name].setting.target

    def one(text: str, rule: str, names: Sequence[str], holds: Callable[[float], bool]) -> Claim:
        errors = [error(name) for name in names]
        return Claim(
            "EntroPIC, exact table", text, rule, ", ".join(f"{e:+.1%}" for e in errors), (all(map(holds, errors)),)
        )

    starts = ("above", "below")
    on, off = ([f"P, {place}, from {start}" for start in starts] for place in ("on-policy", "off-policy"))
    pi = [f"PI, off-policy, from {start}" for start in starts]
    return [
        one("P converges on-policy", "error at the end below 1 %, both starts", on, lambda e: abs(e) < 0.01),
        one("P leaves a steady error off-policy", "above 5 %, both starts", off, lambda e: abs(e) > 0.05),
        one("PI removes it", "below 1 %, both starts", pi, lambda e: abs(e) < 0.01),
        one("the full form holds its target", "below 10 %", ["PI, on-policy, full form"], lambda e: abs(e) < 0.1),
    ]


def _comparisons(results: Results) -> list[Claim]:
    """One run's value above another's, seed by seed."""
    found = []
    for paper, text, metric, more, less in (
        ("DAPO", "a higher clip bound and its company keep more entropy than GRPO", ENTROPY, "clip_higher", "grpo"),
        ("Clip-Cov", "leaving out tokens of high covariance keeps more entropy than GRPO", ENTROPY, "clip_cov", "grpo"),
        ("KL-Cov", "a penalty on tokens of high covariance keeps more entropy than GRPO", ENTROPY, "kl_cov", "grpo"),
        ("NSR", "negative samples keep more entropy than positive ones", ENTROPY, "nsr", "psr"),
        ("NSR", "negative samples alone answer better than GRPO", AVG, "nsr", "grpo"),
        ("Ent-Adv", "the entropy term in the advantage answers better than GRPO", AVG, "entropy_advantage", "grpo"),
        ("80/20", "the 20 % of highest entropy suffice to answer better than GRPO", AVG, "forking_tokens", "grpo"),
        ("SENT", "KL on low-entropy tokens keeps more entropy than GRPO", ENTROPY, "sent_no_curriculum", "grpo"),
        ("SENT", "the curriculum answers better than SENT without it", AVG, "sent", "sent_no_curriculum"),
    ):  # fmt: skip
        said = "held-out avg@k" if metric == AVG else "late entropy"
        found.append(
            _claim(
                results, paper, text, [more, less], f"{said} above that of {less}",
                lambda a, b, metric=metric: [x > y for x, y in zip(_value(a, metric), _value(b, metric), strict=True)],
                lambda a, b, metric=metric: f"{_spread(_value(a, metric))} against {_spread(_value(b, metric))}",
            )
        )  # fmt: skip
    return [*found, _second_stage(results)]


def _value(run: Result, metric: str) -> list[float]:
    return run.evaluated(next(n for n in run.metrics if n.startswith(AVG))) if metric == AVG else run.late(metric)


def _second_stage(results: Results) -> Claim:
    """SENT's curriculum: uncertain problems come last, and bring entropy back."""

    def stages(run: Result) -> list[tuple[float, float]]:
        pairs = []
        for entropy, stage in zip(run.curves(ENTROPY), run.curves("data/stage"), strict=True):
            first = [e for e, s in zip(entropy, stage, strict=True) if s == 0 and e is not None]
            second = [e for e, s in zip(entropy, stage, strict=True) if s == 1 and e is not None]
            pairs.append((statistics.fmean(first[len(first) * 2 // 3 :]), statistics.fmean(second or [0.0])))
        return pairs

    return _claim(
        results, "SENT", "the second stage, of uncertain problems, brings entropy back", ["sent"],
        "mean entropy of the second stage above that of the first stage's last third",
        lambda run: [second > first for first, second in stages(run)],
        lambda run: f"{_spread([b for _, b in stages(run)])} after {_spread([a for a, _ in stages(run)])}",
    )  # fmt: skip


def _kept(results: Results) -> list[Claim]:
    """pass@k at the largest k, on held-out problems."""
    found = []
    for name, paper in (("siren", "SIREN"), ("aer", "AER"), ("entropic", "EntroPIC"), ("entropy_advantage", "Ent-Adv")):
        found.append(
            _claim(
                results, paper, f"{name} ends with a higher pass@k than GRPO", [name, "grpo"],
                "pass@k on the held-out problems, at the largest k, above GRPO's",
                lambda a, b: [x > y for x, y in zip(_pass(a), _pass(b), strict=True)],
                lambda a, b: f"pass@{_largest(a)} {_percent(_pass(a), '.1%')} against {_percent(_pass(b), '.1%')}",
            )
        )  # fmt: skip
    return found


def _largest(run: Result) -> int:
    return max(run.seeds[0].evaluation["decoding"]["ks"])


def _pass(run: Result) -> list[float]:
    return run.evaluated(f"pass@{_largest(run)}")


def _claim(
    results: Results,
    paper: str,
    text: str,
    runs: Sequence[str],
    rule: str,
    holds: Callable[..., list[bool]],
    measured: Callable[..., str],
) -> Claim:
    if any(name not in results for name in runs):
        return Claim(paper, text, rule, f"needs {', '.join(n for n in runs if n not in results)}", ())
    common = set.intersection(*({seed.number for seed in results[name].seeds} for name in runs))
    if not common:
        return Claim(paper, text, rule, f"no seed of {' and '.join(runs)} together", ())
    found = [results[name].only(common) for name in runs]
    return Claim(paper, text, rule, measured(*found), tuple(holds(*found)))


def _distance_and_output(run: Result) -> str:
    return (
        f"distance {_percent(run.distance)}, output at its bound in {statistics.fmean(run.saturated):.0%} of late steps"
    )


def _spread(values: Sequence[float]) -> str:
    if not values:
        return "-"
    if len(values) == 1:
        return f"{values[0]:.3f}"
    return f"{statistics.fmean(values):.3f} ± {statistics.stdev(values):.3f}"


def _percent(values: Sequence[float], style: str = "+.1%") -> str:
    if not values:
        return "-"
    if len(values) == 1:
        return f"{values[0]:{style}}"
    return f"{statistics.fmean(values):{style}} ± {statistics.stdev(values):.1%}"
