"""The responses that a run kept: token by token, by token string and by problem.

In the text, the hotter the colour, the less certain the policy was. Entropies are in nats, of the distribution the
token was drawn from. Every text is escaped here.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from html import escape

from ..charts import short
from .data import Response
from .evaluation import SHORT, clipped

NUM_HEATS = 10  # classes h0 .. h9 of the style sheet
SHOWN_STEPS, SHOWN_PER_STEP, SHOWN_TOKENS = 4, 3, 4000
KEPT_STEPS = 64
LISTED = 12  # tokens, and problems, at either end
SELDOM = 0.001  # share of all tokens below which a string's mean says little ...
FEWEST = 10  # ... and the count below which it says nothing


@dataclass
class TokenCount:
    """A token string in the first half of the run and in the second: how often, and its entropies' sum in nats."""

    count: list[int] = field(default_factory=lambda: [0, 0])
    nats: list[float] = field(default_factory=lambda: [0.0, 0.0])

    @property
    def mean(self) -> float:
        return sum(self.nats) / sum(self.count)


@dataclass
class ProblemCount:
    """A training problem's rewards, in the order of the steps that kept a response to it."""

    prompt: str
    answer: str
    rewards: list[float] = field(default_factory=list)


@dataclass
class Kept:
    """What is remembered of the responses while they pass: a few of them whole, counts of all."""

    half: float  # the step that divides the run
    by_step: dict[int, list[Response]] = field(default_factory=dict)
    tokens: dict[str, TokenCount] = field(default_factory=dict)
    problems: dict[str, ProblemCount] = field(default_factory=dict)
    num_responses: int = 0

    def add(self, row: Response) -> None:
        self.num_responses += 1
        if row.step not in self.by_step and len(self.by_step) >= 2 * KEPT_STEPS:
            self.by_step = {step: self.by_step[step] for step in list(self.by_step)[::2]}
        shown = self.by_step.setdefault(row.step, [])
        if len(shown) < SHOWN_PER_STEP:
            shown.append(row)
        late = int(row.step > self.half)
        for text, nats in zip(row.tokens, row.entropy, strict=True):
            if nats is not None:
                found = self.tokens.setdefault(text, TokenCount())
                found.count[late] += 1
                found.nats[late] += nats
        reward = row.reward if row.group_reward is None else row.group_reward
        if reward is not None:
            problem = self.problems.setdefault(
                row.problem_id, ProblemCount(clipped(row.prompt), clipped(row.answer, SHORT))
            )
            problem.rewards.append(reward)


def keep(responses: Iterable[Response], steps: Sequence[int]) -> Kept:
    """Pass over the responses of a run of these steps once."""
    found = Kept((steps[0] + steps[-1]) / 2)
    for row in responses:
        found.add(row)
    return found


def pick(by_step: Mapping[int, list[Response]]) -> dict[int, list[Response]]:
    """Responses of a few steps spread over those there are, the first and the last included."""
    steps = sorted(by_step)
    if not steps:
        return {}
    wanted = {steps[round(i * (len(steps) - 1) / (SHOWN_STEPS - 1))] for i in range(SHOWN_STEPS)}
    return {step: by_step[step] for step in sorted(wanted)}


# --- by token and by problem ---


def token_table(kept: Kept) -> str:
    """The token strings with the highest and the lowest mean entropy, of those that occur often enough."""
    total = sum(sum(token.count) for token in kept.tokens.values())
    nats = math.fsum(sum(token.nats) for token in kept.tokens.values())
    often = {text: token for text, token in kept.tokens.items() if sum(token.count) >= max(FEWEST, SELDOM * total)}
    ranked = sorted(often, key=lambda text: -often[text].mean)
    if not ranked:
        return ""
    low = ranked[max(LISTED, len(ranked) - LISTED) :][::-1]
    tables = "".join(
        _card(title, ("token", "mean", "1st half", "2nd half", "times", "of all entropy"), rows)
        for title, texts in (("Highest mean entropy", ranked[:LISTED]), ("Lowest mean entropy", low))
        if (rows := [_token_row(text, often[text], nats) for text in texts])
    )
    return (
        f'<h2>Entropy by token</h2><p class="sub">Mean nats at the positions where a token was drawn, over {total} '
        f"tokens of {kept.num_responses} responses: of the whole run, of its first and its second half. "
        f"Tokens that occur fewer than {max(FEWEST, math.ceil(SELDOM * total))} times are left out.</p>"
        f'<div class="pair">{tables}</div>'
    )


def _token_row(text: str, token: TokenCount, nats: float) -> str:
    halves = [short(n / c) if c else "-" for n, c in zip(token.nats, token.count, strict=True)]
    share = sum(token.nats) / nats if nats > 0 else 0.0
    cells = (short(token.mean), *halves, str(sum(token.count)), f"{share:.1%}".replace("%", " %"))
    numbers = "".join(f'<td class="n">{cell}</td>' for cell in cells)
    return f"<tr><th><code>{escape(visible(text))}</code></th>{numbers}</tr>"


def visible(text: str) -> str:
    """A token with its white space visible."""
    return text.replace(" ", "␣").replace("\n", "↵").replace("\t", "⇥") or "(empty)"


def problem_table(kept: Kept) -> str:
    """The training problems with the lowest and the highest mean reward, of those that the run kept responses to."""
    means = {name: math.fsum(found.rewards) / len(found.rewards) for name, found in kept.problems.items()}
    ranked = sorted(means, key=lambda name: (means[name], -len(kept.problems[name].rewards)))
    if not ranked:
        return ""
    high = ranked[max(LISTED, len(ranked) - LISTED) :][::-1]
    tables = "".join(
        _card(title, ("problem", "prompt", "answer", "reward", "times"), rows)
        for title, names in (("Lowest reward", ranked[:LISTED]), ("Highest reward", high))
        if (rows := [_problem_row(name, kept.problems[name], means[name]) for name in names])
    )
    return (
        f'<h2>Reward by problem</h2><p class="sub">Mean reward of a prompt\'s responses while training, for the '
        f"{len(ranked)} problems that the run kept a response to (log.samples a step); of several times, first → last."
        f'</p><div class="pair">{tables}</div>'
    )


def _problem_row(name: str, problem: ProblemCount, mean: float) -> str:
    change = ""
    if len(problem.rewards) > 1:
        change = f" <small>{short(problem.rewards[0])} → {short(problem.rewards[-1])}</small>"
    return (
        f"<tr><th>{escape(clipped(name))}</th><td class='text'>{escape(problem.prompt)}</td>"
        f'<td>{escape(problem.answer)}</td><td class="n">{short(mean)}{change}</td>'
        f'<td class="n">{len(problem.rewards)}</td></tr>'
    )


def _card(title: str, head: Sequence[str], rows: Sequence[str]) -> str:
    words = {"token", "problem", "prompt", "answer"}
    cells = "".join(f'<th class="{"" if name in words else "n"}">{name}</th>' for name in head)
    return f'<div class="card"><h3>{title}</h3><table><tr>{cells}</tr>{"".join(rows)}</table></div>'


# --- token by token ---


def samples(found: Mapping[int, Sequence[Response]]) -> str:
    """Responses token by token, the colour scale shared by all of them."""
    entropies = sorted(value for rows in found.values() for row in rows for value in row.entropy if value is not None)
    if not entropies:
        return ""
    hottest = max(entropies[int(0.98 * (len(entropies) - 1))], 0.05)
    parts = [f"<h2>Responses</h2>{_scale(entropies, hottest)}"]
    for step, rows in found.items():
        cards = "".join(_sample(row, hottest) for row in rows)
        is_open = " open" if step in (min(found), max(found)) else ""
        parts.append(f"<details{is_open}><summary>Step {step}</summary>{cards}</details>")
    return "".join(parts)


def _scale(entropies: Sequence[float], hottest: float) -> str:
    """Legend: the ramp, how many tokens are where on it, and how concentrated the entropy is."""
    counts = [0] * NUM_HEATS
    for value in entropies:
        counts[_heat(value, hottest)] += 1
    tallest = max(counts)
    bars = "".join(f'<span style="height:{100 * (count / tallest) ** 0.5:.0f}%"></span>' for count in counts)
    half, total, num_tokens = 0.0, math.fsum(entropies), 0
    while total > 0 and half < total / 2:
        num_tokens += 1
        half += entropies[-num_tokens]
    return (
        f'<div class="card scale"><div class="bar"><div class="hist">{bars}</div><div class="ramp"></div>'
        f'<div class="ends"><span>0</span><span>{short(hottest / 2)}</span><span>≥ {short(hottest)} nats</span></div>'
        "</div><p>Each token is coloured by the entropy of the distribution it was drawn from. Half of all the entropy "
        f"below sits in <b>{num_tokens / len(entropies):.1%}</b> of the tokens. "
        "Point at a token for its numbers.</p></div>"
    )


def _sample(row: Response, hottest: float) -> str:
    known = [value for value in row.entropy if value is not None]
    chips = [
        f'<span class="chip {"good" if row.outcome == "correct" else "bad"}">{escape(row.outcome)}</span>',
        *(f'<span class="chip">{escape(text)}</span>' for text in _facts(row, known)),
    ]
    tokens = list(zip(row.tokens, row.entropy, row.logprob, strict=True))
    text = "".join(_token(token, entropy, logprob, hottest) for token, entropy, logprob in tokens[:SHOWN_TOKENS])
    if len(tokens) > SHOWN_TOKENS:
        text += f"<b>… {len(tokens) - SHOWN_TOKENS} more tokens</b>"
    return (
        f'<div class="card sample">{"".join(chips)}<p class="prompt">{escape(row.prompt)}</p>'
        f'<div class="response">{text}</div></div>'
    )


def _facts(row: Response, entropies: Sequence[float]) -> list[str]:
    reward = "NaN" if row.reward is None else short(row.reward)
    facts = [f"problem {row.problem_id}", f"reward {reward}", f"{len(row.tokens)} tokens"]
    if entropies:
        facts.append(f"mean entropy {math.fsum(entropies) / len(entropies):.3f}")
    facts.append(f"answer {row.answer}")
    facts += [f"found {row.extracted}"] if row.extracted is not None else []
    return facts + (["cut off"] if row.truncated else [])


def _token(text: str, entropy: float | None, logprob: float | None, hottest: float) -> str:
    heat = "" if entropy is None else f' class="h{_heat(entropy, hottest)}"'
    numbers = f"{short(entropy)} {'-' if logprob is None else short(math.exp(min(logprob, 0.0)))}"
    shown, original = escape(text), ""
    if "\n" in text:
        shown = shown.replace("\n", '<span class="nl">↵</span>\n')
        original = f' data-s="{escape(text)}"'
    return f'<i{heat} data-t="{numbers}"{original}>{shown}</i>'


def _heat(entropy: float, hottest: float) -> int:
    return min(NUM_HEATS - 1, int(NUM_HEATS * min(1.0, max(entropy, 0.0) / hottest)))
