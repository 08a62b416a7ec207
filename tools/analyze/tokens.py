"""The most frequent tokens among those of high entropy, or among those that a method selects.

SIREN Figure 8 (its peak-entropy tokens as a cloud of at most 200 words), SENT Figure 8 (low- and high-entropy tokens).
"""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from rich.console import Console

from megatron_ext.config.errors import ConfigError

from ..arguments import whole_number
from . import figures
from .batches import create_method, selections
from .figures import INK, PALETTE, SOFT, Result, visible
from .scored import Scored, Source, sources

WORDS = 200  # of a cloud
SHOWN, LISTED = 18, 200  # rows of the figure's table, and of the JSON's


def arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--method", help="count the tokens that this method selects, by its own code, instead of the quantile's")
    add("--method-option", action="append", default=[], metavar="KEY=VALUE", help="of the method, such as tau=0.9")
    add("--mini-batch-prompts", type=whole_number(1), help="problems over which the method selects at once (all)")
    add("--below", action="store_true", help="count the tokens of at most the quantile's entropy instead")
    add("--without-cloud", action="store_true", help="a table only")


def analyze(options: argparse.Namespace, console: Console) -> Result:
    method = create_method(options.method, options.method_option) if options.method else None
    found = sources(options, console, needs=method.needs if method else None)
    chosen: dict[str, tuple[list[str], np.ndarray, np.ndarray]] = {}
    for source in found:
        prefix = f"{source.label}: " if len(found) > 1 else ""
        for name, part in _chosen(source, method, options).items():
            chosen[prefix + name] = part
    tables = {name: ranked(texts, entropy, mask) for name, (texts, entropy, mask) in chosen.items()}
    if empty := [name for name, (_, _, mask) in chosen.items() if not mask.any()]:
        raise ConfigError(f"tokens: {empty[0]}: no token is selected; lower --quantile, or give more samples")
    title = options.title or _title(found, options)
    figure = _draw(title, tables, {n: int(m.sum()) for n, (_, _, m) in chosen.items()}, not options.without_cloud)
    content = {
        "models": {source.label: source.described() for source in found},
        "selections": {
            name: {
                "tokens": int(mask.sum()),
                "of": len(mask),
                "share": float(mask.mean()),
                "mean_entropy": float(entropy[mask].mean()),
                "mean_entropy_of_the_others": float(entropy[~mask].mean()) if not mask.all() else None,
                "ranked": tables[name][:LISTED],
            }
            for name, (_, entropy, mask) in chosen.items()
        },
    }
    lines = [
        f"{name}: {mask.sum()} of {len(mask)} tokens; " + ", ".join(
            f"{visible(row['token'])} {row['count']} ({100 * row['share']:.1f} %)" for row in tables[name][:6]
        )
        for name, (_, _, mask) in chosen.items()
    ]  # fmt: skip
    meaning = (
        "count: how often a token is among the selected ones; share: of all selected ones; selected: which part of the "
        "token's own occurrences is; entropy: its mean there, in nats. ␣ is a space, ↵ a new line. The cloud's words "
        "are the same tokens without spaces, their size by count."
    )
    return Result(title, figure, content, meaning, lines)


def ranked(texts: Sequence[str], entropy: np.ndarray, mask: np.ndarray) -> list[dict[str, Any]]:
    """Each selected token's count, its share of all selected, the part of its occurrences, and its mean entropy."""
    everywhere, count = Counter(texts), Counter[str]()
    nats: dict[str, float] = {}
    for place in np.flatnonzero(mask).tolist():
        count[texts[place]] += 1
        nats[texts[place]] = nats.get(texts[place], 0.0) + float(entropy[place])
    total = max(1, int(mask.sum()))
    return [
        {
            "token": token,
            "count": times,
            "share": times / total,
            "selected": times / everywhere[token],
            "entropy": nats[token] / times,
        }
        for token, times in sorted(count.items(), key=lambda item: (-item[1], item[0]))
    ]


def _chosen(
    source: Source, method: Any, options: argparse.Namespace
) -> dict[str, tuple[list[str], np.ndarray, np.ndarray]]:
    """``name of a set -> every token's text, entropy, and whether it is in the set``."""
    if method is not None:
        if source.kind != "model":
            raise ConfigError(
                f"--method: {source.path} holds single responses of a step, a method selects among whole groups; give "
                "an export with --samples"
            )
        ordered, masks = selections(source.responses, method, options.mini_batch_prompts)
        return {name: (_texts(ordered), _entropy(ordered), mask) for name, mask in masks.items()}
    entropy = source.entropy
    cutoff = float(np.quantile(entropy, options.quantile))
    mask = entropy <= cutoff if options.below else entropy > cutoff
    name = f"entropy {'≤' if options.below else '>'} {cutoff:.3g} nats ({100 * options.quantile:g} % quantile)"
    return {name: (source.texts, entropy, mask)}


def _texts(responses: Sequence[Scored]) -> list[str]:
    return [text for response in responses for text in response.texts]


def _entropy(responses: Sequence[Scored]) -> np.ndarray:
    return np.concatenate([response.entropy for response in responses])


def _title(found: Sequence[Source], options: argparse.Namespace) -> str:
    of = f": {found[0].label}" if len(found) == 1 else ""
    if options.method:
        return f"Tokens that {options.method} selects{of}"
    return f"Most frequent {'low' if options.below else 'high'}-entropy tokens{of}"


def _draw(title: str, tables: Mapping[str, list[dict[str, Any]]], sizes: Mapping[str, int], cloud: bool) -> Figure:
    figure = Figure(figsize=(9.6 if cloud else 5.2, 4.9 * len(tables) + 0.5), layout="constrained")
    figures.headed(figure, title)
    for part, (name, rows) in zip(
        figure.subfigures(len(tables), 1, squeeze=False).ravel(), tables.items(), strict=True
    ):
        left, *right = np.atleast_1d(part.subplots(1, 2 if cloud else 1, width_ratios=(1, 1.45) if cloud else None))
        _bars(left, rows[:SHOWN], f"{name}: {sizes[name]:,} tokens")
        if right:
            _cloud(right[0], rows)
    return figure


def _bars(axes: Axes, rows: Sequence[dict[str, Any]], name: str) -> None:
    names = [visible(row["token"]) for row in rows]
    places = range(len(rows))
    axes.barh(places, [row["share"] for row in rows], color=PALETTE[0], height=0.72)
    for place, row in zip(places, rows, strict=True):
        axes.annotate(f"{row['count']:,}", (row["share"], place), (4, 0), textcoords="offset points", va="center",
                      fontsize=8, color=SOFT)  # fmt: skip
    axes.set_yticks(places, names, fontfamily="DejaVu Sans Mono", fontsize=9)
    axes.invert_yaxis()
    axes.grid(False)
    axes.tick_params(axis="y", length=0)
    axes.margins(x=0.16)
    axes.set_title(name)
    axes.set_xlabel("share of the selected tokens (count beside)")
    figures.percent_axis(axes.xaxis)
    axes.xaxis.set_major_locator(MaxNLocator(5))


def _cloud(axes: Axes, rows: Sequence[dict[str, Any]]) -> None:
    """At most WORDS words, their size by count. The same every time."""
    from matplotlib.font_manager import findfont
    from wordcloud import WordCloud

    words: Counter[str] = Counter()
    for row in rows:
        if word := row["token"].strip():
            words[visible(word)] += row["count"]
    axes.axis("off")
    if not words:
        axes.text(0.5, 0.5, "only white space", ha="center", color=SOFT)
        return
    colors = (INK, *PALETTE[:5])
    picture = WordCloud(
        width=1100, height=860, background_color="white", max_words=WORDS, random_state=0, prefer_horizontal=1.0,
        relative_scaling=0.45,  # pyright: ignore[reportArgumentType]
        min_font_size=9, font_path=findfont("DejaVu Sans"), margin=3,
        color_func=lambda word, **_: colors[sum(map(ord, word)) % len(colors)],
    ).generate_from_frequencies(dict(words.most_common(WORDS)))  # fmt: skip
    axes.imshow(picture.to_array(), interpolation="bilinear")
