"""The pages of docs/ that are made from the code.

    python -m tools.docs            which of them are out of date (exit code 1 if any is)
    python -m tools.docs --write    write them

docs/configuration.md comes from config/schema.py, docs/metrics.md from metrics/glossary.py and the methods,
docs/methods.md and docs/surrogates.md from the methods' own files, docs/data-sets.md from config/public_sets.toml,
docs/other-stacks.md from config/aliases.py. The tests fail while a page is out of date. Exit codes: 0 up to date or
written, 1 out of date, 2 a page cannot be written.
"""

from __future__ import annotations

import argparse
import inspect
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from types import ModuleType

from megatron_ext.config.aliases import ALIASES
from megatron_ext.config.describe import Key, sections, toml_value
from megatron_ext.config.public_sets import PublicSet, public_sets
from megatron_ext.methods import METHODS, surrogates, targets
from megatron_ext.metric import Metric
from megatron_ext.metrics.glossary import METRICS

from . import methods

DOCS = Path(__file__).parents[1] / "docs"
GENERATED = "<!-- made by `python -m tools.docs --write`; do not edit -->"


def configuration() -> str:
    lines = [
        GENERATED,
        "# Configuration",
        "",
        "Every key of a recipe. A recipe states only what differs from its `parent` (another recipe, by relative "
        "path) or from the defaults below; `section.key=value` on the command line overrides both. "
        "`megatron-entropy train RECIPE --print-config` prints the merged, checked configuration with these "
        "descriptions. An unknown key, an impossible value or a combination that cannot run is an error that says what "
        "to do.",
    ]
    for name, description, keys in sections():
        lines += ["", f"## `[{name}]`" if name else "## Top level", "", description, ""]
        lines += table(("key", "values", "default", "meaning"), (_key(key) for key in keys))
    return "\n".join([*lines, ""])


def method_pages() -> str:
    lines = [
        GENERATED,
        "# Methods",
        "",
        "Every value of `method.name`. Each method is one file under `megatron_ext/methods/`, whose opening text is "
        "repeated below.",
        "",
        methods.table(links=False),
    ]
    lines += [
        "",
        "`surrogate`, an option of every method, puts another loss in the place of the clipped one: "
        "[surrogates.md](surrogates.md). The methods with a `target` hold entropy at it, [fixed or moving](#targets).",
    ]
    for module, names in _by_module().items():
        lines += ["", f"## {', '.join(f'`{name}`' for name in names)}", "", *_opening(sys.modules[module])]
    return "\n".join([*lines, "", "## Targets", "", *_opening(targets), ""])


def surrogate_page() -> str:
    lines = [
        GENERATED,
        "# Surrogates",
        "",
        "The values of `method.surrogate`, which every method takes: a name, or a table of its `kind` and options. "
        "On the command line `method.surrogate=gspo`, or `method.surrogate.kind=gspo method.surrogate.clip_high=1e-3`; "
        'below `[method]` of a recipe `surrogate = "gspo"`, or `surrogate = {kind = "gspo", clip_high = 1e-3}`. The '
        "clip range of `ppo`, the default, is the method's own. The last column is what the paper has beside its loss.",
        "",
    ]
    rows = (
        (
            f"`{kind}`",
            f"[{cls.paper}](https://arxiv.org/abs/{cls.paper})",
            ", ".join(f"`{name} = {toml_value(value)}`" for name, value in surrogates.options_of(kind).items()),
            cls.beside,
        )
        for kind, cls in surrogates.KINDS.items()
    )
    lines += [*table(("`kind`", "paper", "options", "beside it"), rows), "", *_opening(surrogates), ""]
    return "\n".join(lines)


def metric_page() -> str:
    """The trainer's metrics by section, then those of each method's page."""
    lines = [
        GENERATED,
        "# Metrics",
        "",
        "Every key of a run's `metrics.jsonl`: one line a step, over all ranks. A name with a `<part>` is a family. "
        "All but `time/`, `speed/` and `servers/` follow from the configuration and the seed alone. The report, the "
        "live table and the alarms use these words; [debugging.md](debugging.md) goes from a symptom to the metric.",
    ]
    for section in dict.fromkeys(metric.section for metric in METRICS):
        lines += ["", f"## {section}", "", *_metrics(metric for metric in METRICS if metric.section == section)]
    lines += ["", "## Of methods", "", "A method reports these besides those of the methods that it builds on."]
    pages = dict.fromkeys(page for cls in METHODS.values() for page in reversed(cls.__mro__))
    for page in pages:
        if own := vars(page).get("metrics_glossary"):
            lines += ["", f"### {page.__name__}", "", *_metrics(own)]
    return "\n".join([*lines, ""])


def data_set_page() -> str:
    lines = [
        GENERATED,
        "# Data sets",
        "",
        "The sets that recipes and suites name: `data/NAME.jsonl` is made by `megatron-entropy data NAME SOURCE --out "
        "data/NAME.jsonl` ([data.md](data.md)). `megatron-entropy data --list` prints this table with the commands "
        "that fetch and prepare each set.",
    ]
    head = ("set", "from", "rows", "used by", "licence", "to know")
    for use in ("training", "evaluation"):
        rows = (_public_set(found) for found in public_sets().values() if found.use == use)
        lines += ["", f"## For {use}", "", *table(head, rows)]
    return "\n".join([*lines, ""])


NOT_HERE = (
    ("LoRA and other adapters", "all weights train"),
    ("supervised fine-tuning, preference learning, distillation", "start from a checkpoint that has had them"),
    ("a reward model", "rewards are verified, or a function of your own ([own-code.md](own-code.md))"),
    ("several turns, tools, agents", "one prompt, one response"),
    ("images, audio", "text alone"),
    ("SGLang, TensorRT-LLM", "transformers or vLLM, or [an engine of your own](adding-an-engine.md)"),
    ("FSDP, DeepSpeed ZeRO", "Megatron-Core's tensor, pipeline, context, expert and data parallelism"),
    ("FP8 training", "bfloat16 with float32 main weights, or float32"),
    ("Ray", "Slurm, NeMo-Run, or one command on every node"),
)


def other_stacks() -> str:
    """Our keys with their names elsewhere, in the order of aliases.py."""
    lines = [
        GENERATED,
        "# Coming from another stack",
        "",
        "What keys of verl, OpenRLHF, NeMo-RL, slime, TRL and Megatron-LM are called here. A recipe or an override "
        "with one of these names is an error that says the same; the end of a dotted key is enough (`rollout.n` of "
        "`actor_rollout_ref.rollout.n`). What the keys mean: [configuration.md](configuration.md).",
        "",
    ]
    names: dict[str, list[str]] = {}
    for other, ours in ALIASES.items():
        names.setdefault(ours, []).append(other)
    rows = ((_as_code(ours), ", ".join(f"`{name}`" for name in others)) for ours, others in names.items())
    lines += [*table(("here", "elsewhere"), rows), "", "## What is not here", ""]
    return "\n".join([*lines, *table(("elsewhere", "here"), NOT_HERE), ""])


PAGES: dict[str, Callable[[], str]] = {
    "configuration.md": configuration,
    "metrics.md": metric_page,
    "methods.md": method_pages,
    "surrogates.md": surrogate_page,
    "data-sets.md": data_set_page,
    "other-stacks.md": other_stacks,
}


def table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> list[str]:
    """The lines of a Markdown table."""
    head = list(head)
    return [_row(head), _row("---" for _ in head), *map(_row, rows)]


def out_of_date() -> list[str]:
    """The pages whose file is not what the code says."""
    return [name for name, page in PAGES.items() if not (DOCS / name).is_file() or (DOCS / name).read_text() != page()]


def _key(key: Key) -> list[str]:
    named = isinstance(key.default, dict) and "name" in key.default  # the method's table
    default = f'name = "{key.default["name"]}"' if named else toml_value(key.default)
    return [f"`{key.name}`", key.values, f"`{default}`", key.description]


def _as_code(text: str) -> str:
    """``key (what differs)`` with the key as code."""
    key, *rest = text.split(" (", 1)
    return " and ".join(f"`{name}`" for name in key.split(" and ")) + "".join(f" ({each}" for each in rest)


def _metrics(metrics: Iterable[Metric]) -> list[str]:
    return table(("metric", "unit", "meaning", "good", "too low", "too high"), map(_metric, metrics))


def _metric(metric: Metric) -> list[str]:
    return [f"`{metric.name}`", metric.unit, metric.meaning, metric.good, metric.low, metric.high]


def _public_set(found: PublicSet) -> list[str]:
    place = f"`{found.hub}`" if found.hub else f"<{found.url}>" if found.url else f"{', '.join(found.parts)}, filtered"
    copy = ", ".join(filter(None, [*found.config, found.split]))
    size = f"{found.rows:,}" if found.rows else ""
    return [f"`{found.name}`", f"{place} ({copy})" if copy else place, size, found.used, found.licence, found.traps]


def _opening(module: ModuleType) -> list[str]:
    """A module's opening text: its first line, and the rest as it stands there."""
    heading, text = (inspect.getdoc(module) or "").split("\n", 1)
    return [heading, "", "```text", text.strip("\n"), "```"]


def _by_module() -> dict[str, list[str]]:
    """The names of the methods by the module that defines them."""
    found: dict[str, list[str]] = {}
    for name, cls in METHODS.items():
        found.setdefault(cls.__module__, []).append(name)
    return found


def _row(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cell.replace('|', chr(92) + '|') or '-' for cell in cells)} |"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tools.docs", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--write", action="store_true", help="write the pages")
    old, write = out_of_date(), parser.parse_args(arguments).write
    if write:
        try:
            for name in old:
                (DOCS / name).write_text(PAGES[name]())
        except OSError as error:
            print(f"docs: {error}", file=sys.stderr)
            return 2
    for name in PAGES:
        state = "up to date" if name not in old else "written" if write else "out of date"
        print(f"{DOCS / name}: {state}")
    return 1 if old and not write else 0


if __name__ == "__main__":
    sys.exit(main())
