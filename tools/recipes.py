"""List the shipped recipes by the names that every command takes.

megatron-entropy recipes                  the folder, and every recipe below it
megatron-entropy recipes 'siren*'         those whose name matches
megatron-entropy train siren-tiny-cpu     uses one; so does  parent = "recipes/siren/siren-tiny-cpu.toml"
                                          in a recipe of your own
"""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from fnmatch import fnmatch
from pathlib import Path

from megatron_ext.config.shipped import RECIPES, names

from .arguments import command_parser


def slurm_command(recipe: Path, overrides: Sequence[str] = ()) -> str:
    """What submits a recipe. Any script of slurm/ does: RECIPE takes the place of its own and says the size."""
    return f"RECIPE={shlex.quote(str(recipe))} {shlex.join(['bash', 'slurm/siren_7b.sh', *overrides])}"


def main(arguments: list[str] | None = None) -> int:
    parser = command_parser("recipes", __doc__)
    parser.add_argument("pattern", nargs="?", default="*", help="of names, such as 'siren*' or '*-8n8g' (all)")
    options = parser.parse_args(arguments)
    found = [name for name in names() if fnmatch(Path(name).stem, options.pattern)]
    if not found:
        print(f"recipes: no recipe below {RECIPES} matches {options.pattern!r}", file=sys.stderr)
        return 2
    print("\n".join([f"{RECIPES}:", *(f"  {name}" for name in found)]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
