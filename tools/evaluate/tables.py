"""Evaluations as tables for the terminal: one model's, several models' beside each other, and a suite's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich import box, markup
from rich.table import Table

from megatron_ext.metrics.eval_stats import differences

ABOUT = {  # key of an evaluation's ``response`` -> its row, and whether it is a share
    "length": ("length", False),
    "truncated": ("truncated", True),
    "loop": ("with a loop", True),
    "repeated": ("repeated 4-grams", True),
    "reflective": ("reflective words", False),
}
GROUPS = ("kind", "level")


def table(evaluation: dict[str, Any]) -> Table:
    """The metrics with their intervals, for the terminal."""
    found = Table(title=title(evaluation))
    for name, justify in (("metric", "left"), ("mean", "right"), ("95 % interval", "right")):
        found.add_column(name, justify=justify)  # type: ignore[arg-type]
    for name, value in evaluation["metrics"].items():
        found.add_row(name, f"{value['mean']:.1%}", f"{value['low']:.1%} .. {value['high']:.1%}")
    found.add_section()
    for name, value in evaluation["response"].items():
        told, share = ABOUT[name]
        form = ".1%" if share else ".1f"
        found.add_row(told, f"{value['mean']:{form}}", f"{value['low']:{form}} .. {value['high']:{form}}")
        if name == "length":
            for side, of in evaluation.get("length_of", {}).items():
                found.add_row(f"length if {side}", _length(of), f"{of['responses']} responses")
    for name, share in evaluation["outcomes"].items():
        found.add_row(f"outcome {name}", f"{share:.1%}", "")
    for key in GROUPS:
        groups = evaluation.get("accuracy", {}).get(key, {})
        if len(groups) > 1:
            found.add_section()
            for name, value in groups.items():
                told = f"{key} {markup.escape(name)} ({value['problems']})"
                found.add_row(told, f"{value['mean']:.1%}", f"{value['low']:.1%} .. {value['high']:.1%}")
    return found


def title(evaluation: Mapping[str, Any]) -> str:
    """Problems, responses and decoding; of responses that the model's positions cut short both lengths."""
    decoding = evaluation["decoding"]
    said = (
        f"{evaluation['num_problems']} problems x {decoding['samples']} responses, "
        f"T {decoding['temperature']:g}, top-p {decoding['top_p']:g}"
    )
    return said + shorter(evaluation)


def shorter(evaluation: Mapping[str, Any]) -> str:
    """`` , at most 3500 .. 4000 tokens instead of 32768``; empty where responses are as long as asked."""
    lengths = evaluation.get("lengths")
    if not lengths or lengths["used_min"] == lengths["asked"]:
        return ""
    return f", at most {lengths['used_min']} .. {lengths['used_max']} tokens instead of {lengths['asked']}"


def side_by_side(evaluations: Mapping[str, dict[str, Any]]) -> list[Table]:
    """The metrics of several models, and the paired differences to the first; evaluations of the same problems."""
    first, *others = evaluations
    values = _labelled("mean and 95 % interval", "metric", evaluations)
    for name in evaluations[first]["metrics"]:
        found = [each["metrics"][name] for each in evaluations.values()]
        values.add_row(name, *(f"{v['mean']:.1%} ({v['low']:.1%} .. {v['high']:.1%})" for v in found))
    pairs = [differences(evaluations[first], evaluations[label]) for label in others]
    changes = _labelled(f"difference to {markup.escape(first)}, points, the same problems", "metric", others)
    for name in evaluations[first]["metrics"]:
        ends = [[100 * x for x in (d[name].interval.mean, d[name].interval.low, d[name].interval.high)] for d in pairs]
        changes.add_row(name, *(f"{mean:+.1f} ({low:+.1f} .. {high:+.1f})" for mean, low, high in ends))
    return [values, changes]


def suite_tables(result: Mapping[str, Any], width: int) -> list[Table]:
    """A suite as the paper shows it, a model a row; the differences to the first; what the responses are like.

    A table has as many columns as fit into ``width`` characters; further ones follow below it.
    """
    models, differing = result["models"], result["differences"]
    found = _suite_table(f"{result['title']}: % and 95 % interval", result, models, "{:.1f}", width)
    if differing:
        first = markup.escape(next(iter(models)))
        title = f"difference to {first}, points, the same problems"
        found += _suite_table(title, result, differing, "{:+.1f}", width)
    found += [_about_responses(label, result) for label in models]
    found += [groups for key in GROUPS if (groups := _by_group(result, key)).row_count]
    return found


def _suite_table(title: str, result: Mapping[str, Any], rows: Mapping[str, Any], form: str, width: int) -> list[Table]:
    heads, cells = _suite_heads(result), {label: _suite_cells(result, row, form) for label, row in rows.items()}
    widest = max(len(line) for each in [heads, *cells.values()] for cell in each for line in cell.split("\n"))
    label = min(max(map(len, rows)), width // 3)
    across = max(1, (width - label - 4) // (widest + 3))
    found = []
    for first in range(0, len(heads), across):
        table = Table(title=None if first else title, title_justify="left")
        table.add_column("model", overflow="fold", max_width=max(label, len("model")))
        for head in heads[first : first + across]:
            table.add_column(markup.escape(head), justify="right", no_wrap=True)
        for name, row in cells.items():
            table.add_row(markup.escape(name), *row[first : first + across])
        found.append(table)
    return found


def _suite_heads(result: Mapping[str, Any]) -> list[str]:
    """Set and metric of each column, the averages last."""
    columns = result["columns"]
    averages = len(next(iter(result["models"].values()))["average"])
    heads = [f"{column['title']}\n{column['metric']}" for column in columns]
    for i in range(averages):
        kinds = dict.fromkeys(column["metric"] for column in columns[i::averages])
        of_all = next(iter(kinds)) if len(kinds) == 1 else "/".join(dict.fromkeys(k.partition("@")[0] for k in kinds))
        heads.append(f"Average\n{of_all}")
    return heads


def _suite_cells(result: Mapping[str, Any], row: Mapping[str, Any], form: str) -> list[str]:
    sets = row["sets"]
    numbers = [sets[c["set"]].get("metrics", sets[c["set"]])[c["metric"]] for c in result["columns"]]
    return [_cell(number, form) for number in [*numbers, *row["average"]]]


def _about_responses(label: str, result: Mapping[str, Any]) -> Table:
    found = Table(title=f"responses of {markup.escape(label)}", title_justify="left", box=box.SIMPLE_HEAD)
    found.add_column("set", overflow="fold")
    heads = ("tokens", "if\ncorrect", "if\nwrong", "cut off", "loops", "repeated\n4-grams", "reflective\nwords")
    for name in heads:
        found.add_column(name, justify="right")
    titles = {column["set"]: column["title"] for column in result["columns"]}
    for name, each in result["models"][label]["sets"].items():
        response, of = {key: value["mean"] for key, value in each["response"].items()}, each["length_of"]
        found.add_row(
            markup.escape(titles[name] + shorter(each)),
            f"{response['length']:.0f}",
            *(_length(side) for side in of.values()),
            *(f"{response[key]:.1%}" for key in ("truncated", "loop", "repeated")),
            f"{response['reflective']:.2f}",
        )
    return found


def _by_group(result: Mapping[str, Any], key: str) -> Table:
    """Accuracy of each model by kind or level, of the sets that have several."""
    models = result["models"]
    found = _labelled(f"accuracy by {key}, % and 95 % interval", "set", models)
    titles = {column["set"]: column["title"] for column in result["columns"]}
    for name, told in titles.items():
        groups = [model["sets"][name]["accuracy"][key] for model in models.values()]
        for group in groups[0] if len(groups[0]) > 1 else ():
            cells = [_cell(each[group], "{:.1f}", " ") if group in each else "" for each in groups]
            found.add_row(f"{markup.escape(told)}, {markup.escape(group)} ({groups[0][group]['problems']})", *cells)
    return found


def _labelled(title: str, first: str, labels: Sequence[str] | Mapping[str, Any]) -> Table:
    found = Table(title=title, title_justify="left")
    found.add_column(first)
    for label in labels:
        found.add_column(markup.escape(label), justify="right", overflow="fold")
    return found


def _cell(value: Mapping[str, float], form: str, between: str = "\n") -> str:
    mean, low, high = (form.format(100 * value[end]) for end in ("mean", "low", "high"))
    return f"{mean}{between}{low}..{high}"


def _length(side: Mapping[str, Any]) -> str:
    return "-" if side["mean"] is None else f"{side['mean']:.0f}"
