"""The pages of docs/ that are made from the code.

    python -m tools.docs            which of them are out of date (exit code 1 if any is)
    python -m tools.docs --write    write them

docs/configuration.md comes from config/schema.py, docs/methods.md from the methods' own files. The tests fail while a
page is out of date. Exit codes: 0 up to date or written, 1 out of date, 2 a page cannot be written.
"""

from __future__ import annotations

import argparse
import inspect
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

from megatron_ext.config.describe import Key, sections, toml_value
from megatron_ext.methods import METHODS

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
    for module, names in _by_module().items():
        heading, text = (inspect.getdoc(sys.modules[module]) or "").split("\n", 1)
        lines += ["", f"## {', '.join(f'`{name}`' for name in names)}", "", heading, "", "```text"]
        lines += [text.strip("\n"), "```"]
    return "\n".join([*lines, ""])


PAGES: dict[str, Callable[[], str]] = {
    "configuration.md": configuration,
    "methods.md": method_pages,
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
