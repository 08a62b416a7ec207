"""Recipes and overrides: any text is a configuration or a message and exit code 2, through the command itself."""

from __future__ import annotations

import io
import math
import re
import tempfile
import tomllib
from collections.abc import Iterator
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Annotated, Any

import pytest
from hypothesis import assume, example, given
from hypothesis import strategies as st
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from megatron_ext.config import shipped
from megatron_ext.config.errors import ConfigError
from megatron_ext.config.loading import read_config
from megatron_ext.config.schema import Config
from tests.properties.oddities import SPOILERS, TEXTS, VALUES, damaged, limits, mutated, to_bytes, to_toml
from tools import ranks, train

RECIPES = Path(__file__).parents[2] / "recipes"
TINY = str(RECIPES / "tiny" / "tiny-cpu.toml")
FILES = [RECIPES / name for name in shipped.names() if not name.startswith(("lab/", "league/"))]


def fields(model: type[BaseModel] = Config, prefix: str = "") -> Iterator[tuple[str, FieldInfo]]:
    """The dotted names of all sections and keys."""
    for name, field in model.model_fields.items():
        yield prefix + name, field
        if is_section(field):
            yield from fields(field.annotation, f"{prefix}{name}.")  # pyright: ignore[reportArgumentType]


def is_section(field: FieldInfo) -> bool:
    return isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel)


FIELDS = dict(fields())
SECTIONS = ["", *(f"{name}." for name, field in FIELDS.items() if is_section(field))]
OPTIONS = ("method.name", "method.coef", "method.target", "method.clip_low")
# files, code of one's own, and sizes that must fit one another
BOUND = (
    *("data.", "rollout.", "parallel.", "model.", "train.", "method", "validation."),
    *("reward.function", "reward.options", "prompt.template"),
)
FALLING = (".min_lr", ".decay_steps")  # belong to some schedules of the learning rate alone


@pytest.fixture(scope="module", autouse=True)
def nothing_is_started() -> Iterator[None]:
    def refuse(*_: object, **__: object) -> int:
        raise AssertionError("ranks were started")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ranks, "run_ranks", refuse)
        yield


def print_config(*arguments: str) -> str:
    """What the command prints: the configuration, or "" where it refuses with a message."""
    out, err = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err), limits():
        code = train.main([*arguments, "--print-config"])
    if code == 2:
        assert not out.getvalue() and re.match(r"configuration error\n.{10}", err.getvalue(), re.DOTALL)
        return ""
    assert code == 0 and not err.getvalue()
    return out.getvalue()


def toml(value: Any) -> str:
    return to_toml({"k": value}).partition(" = ")[2].removesuffix("\n")


@given(data=st.data())
def test_a_recipe_with_something_wrong(data: st.DataObject) -> None:
    recipe = data.draw(st.sampled_from(FILES))
    tree = tomllib.loads(recipe.read_text())
    if "parent" in tree:
        tree["parent"] = str(recipe.parent / tree["parent"])
    text = to_bytes(to_toml(data.draw(mutated(tree))))
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "recipe.toml").write_bytes(data.draw(st.just(text) | damaged(text)))
        print_config(f"{folder}/recipe.toml")


KNOWN = st.sampled_from([*FIELDS, *OPTIONS])
ODD_KEYS = st.lists(KNOWN | st.sampled_from(TEXTS) | st.text(max_size=12), max_size=3).map(".".join)
OVERRIDES = st.builds("{}={}".format, KNOWN | ODD_KEYS, VALUES.map(toml) | st.text(max_size=20)) | st.text(max_size=30)


@given(overrides=st.lists(OVERRIDES, min_size=1, max_size=3))
@example(["." * 100_000 + "=1"])
@example([".".join("a" * 100_000) + "=1"])
def test_any_override(overrides: list[str]) -> None:
    assume(not any(each.startswith("-") for each in overrides))  # an option, which argparse judges
    print_config(TINY, *overrides)


@pytest.mark.parametrize("how", [how for how in SPOILERS if how != "waiting for a writer"])
def test_what_is_no_file(how: str, tmp_path: Path) -> None:
    for name in ("parent.toml", "recipe.toml"):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "parent.toml").write_text(f'parent = "{TINY}"\n')
        (folder / "recipe.toml").write_text('parent = "parent.toml"\n')
        assert print_config(str(folder / "recipe.toml"))
        SPOILERS[how](folder / name)
        assert print_config(str(folder / "recipe.toml")) == ""


@given(parents=st.lists(st.integers(-1, 3), min_size=4, max_size=4))
def test_chains_of_parents_end_or_are_refused(parents: list[int]) -> None:
    """Recipe i names recipe ``parents[i]``, -1 the tiny one."""
    with tempfile.TemporaryDirectory() as folder:
        for number, parent in enumerate(parents):
            named = TINY if parent < 0 else f"{parent}.toml"
            (Path(folder) / f"{number}.toml").write_text(f'parent = "{named}"\nname = "{number}"\n')
        at, seen = 0, set()
        while at >= 0 and at not in seen:
            seen.add(at)
            at = parents[at]
        assert bool(print_config(f"{folder}/0.toml")) == (at < 0)


def test_a_chain_of_thousands_of_parents(tmp_path: Path) -> None:
    for number in range(3000):
        (tmp_path / f"{number}.toml").write_text(f'parent = "{number + 1}.toml"\n')
    assert print_config(str(tmp_path / "0.toml")) == ""


def valid(field: FieldInfo) -> st.SearchStrategy[Any]:
    """What the schema should take for a key."""
    bounded: Any = Annotated[field.annotation, *field.metadata, ""]  # type: ignore[misc]
    values = st.from_type(bounded).filter(lambda value: not isinstance(value, float) or math.isfinite(value))
    return values.filter(lambda value: not isinstance(value, list) or len(set(value)) == len(value))


@given(data=st.data())
def test_what_is_printed_is_a_recipe_of_the_same_run(data: st.DataObject) -> None:
    keys = [name for name, field in FIELDS.items() if not is_section(field)]
    keys = [name for name in keys if not name.startswith(BOUND) and not name.endswith(FALLING)]
    chosen = data.draw(st.lists(st.sampled_from(keys), min_size=1, max_size=4, unique=True))
    values = {key: data.draw(valid(FIELDS[key]), label=key) for key in chosen}
    printed = print_config(TINY, *(f"{key}={toml(value)}" for key, value in values.items()))
    assume(printed or not set(chosen) & {"name"})
    assert printed, values
    with tempfile.TemporaryDirectory() as folder:
        recipe = Path(folder) / "printed.toml"
        recipe.write_bytes(to_bytes(printed))
        assert print_config(str(recipe)) == printed


@given(section=st.sampled_from(SECTIONS), letter=st.sampled_from("abcxyz_"), data=st.data())
def test_an_unknown_key_is_refused_with_the_nearest_known_one(section: str, letter: str, data: st.DataObject) -> None:
    """A key with a letter too much: the known one is named, unless another is as near."""
    siblings = [name.removeprefix(section) for name in FIELDS if name.startswith(section)]
    siblings = [name for name in siblings if "." not in name]
    known = data.draw(st.sampled_from(siblings))
    at = data.draw(st.integers(0, len(known)))
    wrong = known[:at] + letter + known[at:]
    assume(wrong not in siblings)
    with pytest.raises(ConfigError) as error:
        read_config(TINY, [f"{section}{wrong}=1"])
    assert f"{section}{wrong}: unknown key; " in str(error.value)
    named = re.search(r"did you mean (\w+)\?|known keys: (.*)", str(error.value))
    assert named and set((named[1] or named[2]).split(", ")) & {known, *(each for each in siblings if each in wrong)}
