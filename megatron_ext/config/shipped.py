"""The recipes that ship with the package, with the tiny model and its data: found from any directory.

In a checkout they are its ``recipes/``, in a wheel they lie inside the package. For an installed package the current
directory stands in for the checkout: what a recipe expects to be made or downloaded is looked for there, and nothing
is written into the package.
"""

from __future__ import annotations

import difflib
import os
from pathlib import Path

from megatron_ext.config.errors import ConfigError

PACKAGE = Path(__file__).parents[1]
IS_INSTALLED = (PACKAGE / "recipes").is_dir()
ROOT = PACKAGE if IS_INSTALLED else PACKAGE.parent
RECIPES = ROOT / "recipes"
NO_RECIPES = ("suite", "tables")  # what to evaluate, and where a paper says so: how the names of such files begin


def shipped(path: str | Path) -> Path | None:
    """What ships as ``path``, which begins with ``recipes/``; the current directory's comes first."""
    given = Path(path)
    places = (given, ROOT / given) if given.parts[:1] == ("recipes",) else ()
    return next((place for place in places if os.path.exists(place)), None)


def find(path: str | Path) -> Path:
    """``path``, or what ships under that name."""
    return shipped(path) or Path(path)


def find_recipe(name: str | Path) -> Path:
    """The recipe that a user means: a file, a shipped one by its path, or by its file's name with or without .toml.

    Raises ConfigError when there is none, or when several shipped ones have the name.
    """
    given = find(name)
    if os.path.exists(given):
        return given
    path = f"{given}".removesuffix(".toml") + ".toml"
    if len(given.parts) > 1:
        if not given.is_absolute() and os.path.isfile(RECIPES / path):
            return RECIPES / path
        raise ConfigError(f"recipe: no such file: {name}")
    recipes = names()
    found = [recipe for recipe in recipes if Path(recipe).name == path]
    if len(found) == 1:
        return RECIPES / found[0]
    if found:
        raise ConfigError(f"recipe: several are called {name}: {', '.join(found)}; give one of these paths")
    close = difflib.get_close_matches(path, [Path(recipe).name for recipe in recipes], n=1)
    meant = f"; did you mean {close[0].removesuffix('.toml')}?" if close else ""
    raise ConfigError(f"recipe: no such file: {name}{meant}")


def names() -> list[str]:
    """Every shipped recipe as its path below ``recipes/``."""
    files = (path for path in RECIPES.rglob("*.toml") if not path.stem.startswith(NO_RECIPES))
    return sorted(path.relative_to(RECIPES).as_posix() for path in files)


def expected_at(path: str) -> str:
    """Where the file that a recipe means by ``path`` is looked for: ``outside`` the package unless only that has it."""
    return path if os.path.exists(path) and not os.path.exists(outside(path)) else outside(path)


def outside(path: str) -> str:
    """``path``; for one inside an installed package the same place below the current directory."""
    is_inside = IS_INSTALLED and Path(path).is_relative_to(ROOT)
    return os.path.relpath(path, ROOT) if is_inside else path
