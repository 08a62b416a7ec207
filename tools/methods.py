"""The table of all methods, made from the methods themselves.

    megatron-entropy methods            print it
    megatron-entropy methods --write    put it between the markers in a checkout's recipes/README.md
    megatron-entropy methods siren      one method with all its options
    megatron-entropy methods my_package.method:MyMethod        likewise one of your own, as method.name takes it

A row's paper and description are the first line of the method's file, its options those it adds to GRPO or whose
default differs, its needs those of its defaults. Exit codes: 0 done, 2 recipes/README.md has no markers, or there is
no such method.
"""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Iterable
from dataclasses import MISSING, Field, fields
from pathlib import Path
from types import NoneType, UnionType
from typing import Literal, Union, get_args, get_origin

from megatron_ext.methods import METHODS, create, find
from megatron_ext.methods.base import Method, Needs
from megatron_ext.methods.grpo import GRPO
from megatron_ext.plugins import Option, options_of_class

from .arguments import command_parser

README = Path(__file__).parents[1] / "recipes" / "README.md"
BEGIN, END = "<!-- begin: python -m tools.methods --write -->", "<!-- end -->"
COLUMNS = ("`method.name`", "what it is", "paper", "options", "needs", "state", "groups", "recipe")


def table(*, links: bool = True) -> str:
    """All methods in Markdown, in the order of METHODS; their recipes are links from recipes/README.md, or paths."""
    lines = [_row(COLUMNS), _row("---" for _ in COLUMNS)]
    return "\n".join([*lines, *(_row([*cells(name), _recipe(name, links)]) for name in METHODS)])


def cells(name: str) -> list[str]:
    """A row without its recipe."""
    method, cls = create({"name": name}), METHODS[name]
    title, papers = headline(cls)
    return [
        f"`{name}`",
        title,
        ", ".join(map(_link, papers)),
        ", ".join(f"`{option.name} = {_value(option)}`" for option in own_options(cls)),
        ", ".join(needed(method.needs)),
        ", ".join(f"`{state}`" for state in method.state_dict()),
        "relative" if method.group_relative else "no part",
    ]


def _link(paper: str) -> str:
    return f"[report]({paper})" if paper.startswith("https://") else f"[{paper}](https://arxiv.org/abs/{paper})"


def _recipe(name: str, link: bool) -> str:
    path = f"{name}/{name}-tiny-cpu.toml"
    return f"[{path}]({path})" if link else f"`recipes/{path}`"


def listing(name: str) -> str:
    """One method, which ``method.name`` may name, with its options. Raises ValueError."""
    cls = find(name)
    own, module = vars(cls).get("__doc__") or "", inspect.getmodule(cls)
    if own.startswith(f"{cls.__name__}("):  # a dataclass without one gets its signature
        own = ""
    text = own or (module.__doc__ if module is not None else None) or "(no description)"
    known = options_of_class(cls)
    missing = [option for option, found in known.items() if found.default is MISSING]
    lines = [f"{name}: {text.strip().splitlines()[0]}", "", "options of [method]"]
    lines += [f"  {option}: {_type(found.type)}{_default(found)}" for option, found in known.items()]
    if missing:  # it cannot be made without them
        return "\n".join(lines)
    method = cls()
    for title, words in (("needs", needed(method.needs)), ("state", list(method.state_dict()))):
        lines += ["", f"{title}: {', '.join(words) or 'none'}"]
    return "\n".join(lines)


def _type(hint: object) -> str:
    if get_origin(hint) is Literal:
        return " | ".join(map(repr, get_args(hint)))
    if get_origin(hint) in (Union, UnionType):
        return " | ".join(map(_type, get_args(hint)))
    if get_origin(hint) is dict:
        return "table"
    return "None" if hint is NoneType else inspect.formatannotation(hint)


def _default(option: Option) -> str:
    return " (must be given)" if option.default is MISSING else f" = {option.default!r}"


def headline(cls: type[Method]) -> tuple[str, list[str]]:
    """What the first line of the method's file says: its description, and the papers it names, by arXiv id or URL."""
    module = inspect.getmodule(cls)
    assert module is not None and module.__doc__ is not None
    first = module.__doc__.partition("\n")[0]
    found = re.fullmatch(r"(.+?) \((.*arXiv.*)\)\.", first)
    assert found is not None, f"{module.__name__}: expected 'Name: what it is (arXiv 2501.00001).', found {first!r}"
    return found[1], list(dict.fromkeys(re.findall(r"https://[^\s;,]+|\d{4}\.\d{5}", found[2])))


def own_options(cls: type[Method]) -> list[Field]:
    """The options that GRPO does not have or has with another default; GRPO's own are its own."""
    common = {} if cls is GRPO else {option.name: option.default for option in fields(GRPO)}
    return [o for o in fields(cls) if o.init and not (o.name in common and common[o.name] == o.default)]


def needed(needs: Needs) -> list[str]:
    """The statistics and models that the method's defaults ask for, in words."""
    words = []
    if needs.entropy:
        words.append("entropy with gradient" if needs.entropy_grad else "entropy")
    if needs.nucleus_p is not None:
        words.append("nucleus entropy with gradient" if needs.nucleus_grad else "nucleus entropy")
    if needs.min_p is not None:
        words.append("min-p mass with gradient" if needs.min_p_grad else "min-p mass")
    if needs.current:
        words.append("a pass before each update")
    return words + ["reference model"] * needs.reference + ["critic"] * needs.value


def write(path: Path) -> bool:
    """Put the table between the markers; whether the file changed. Raises ValueError without markers."""
    before, begin, rest = path.read_text().partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(
            f"{path}: expected the markers {BEGIN} and {END}, found none; add them where the table belongs"
        )
    text = f"{before}{BEGIN}\n{table()}\n{END}{after}"
    changed = text != path.read_text()
    path.write_text(text)
    return changed


def _value(option: Field) -> str:
    assert option.default is not MISSING
    if option.default is None:
        return "none"
    return str(option.default).lower() if isinstance(option.default, bool) else repr(option.default)


def _row(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cell or '-' for cell in cells)} |"


def main(arguments: list[str] | None = None) -> int:
    parser = command_parser("methods", __doc__)
    parser.add_argument("name", nargs="?", help="one method: a name of the table, or package.module:Name, file.py:Name")
    parser.add_argument("--write", action="store_true", help="write it into recipes/README.md")
    options = parser.parse_args(arguments)
    if not options.write and options.name is None:
        print(table())
        return 0
    try:
        if options.name is not None:
            print(listing(options.name))
            return 0
        changed = write(README)
    except (OSError, ValueError) as error:
        print(f"methods: {error}", file=sys.stderr)
        return 2
    print(f"{README}: {'written' if changed else 'up to date'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
