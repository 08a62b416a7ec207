"""The data files that recipes and suites name, and the commands that bring them. No torch."""

from __future__ import annotations

import functools
import shlex
import tomllib
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, Field

TABLE = Path(__file__).with_suffix(".toml")
FETCHED = "data/hub"  # where the commands put what they fetch


class PublicSet(BaseModel, extra="forbid", frozen=True):
    """A set of problems by its name here. It comes from the Hub, from an address, or from other sets (``parts``)."""

    name: str
    use: Literal["training", "evaluation"] = Field(alias="for")
    hub: str = ""
    url: str = ""
    config: tuple[str, ...] = ()
    split: str = ""
    parts: tuple[str, ...] = ()
    prepare: str = ""  # options of the command that prepares it
    rows: int | None = None
    used: str
    licence: str = "see its card"
    traps: str = ""

    def commands(self, out: str = "") -> list[str]:
        """What a user types, the current directory being the one with ``data/``: fetch, then prepare."""
        out = shlex.quote(out or f"data/{self.name}.jsonl")
        place = f"{FETCHED}/{self.name}"
        options = f" {self.prepare}" if self.prepare else ""
        if self.parts:
            parts = " ".join(f"data/{part}.jsonl" for part in self.parts)
            return [f"megatron-entropy data {self.name} {parts}{options} --out {out}"]
        if self.url:
            place += f"/{self.url.rpartition('/')[2]}"
            fetch = f"curl --create-dirs -L -o {place} {self.url}"
        else:
            fetch = f"hf download {self.hub} --repo-type dataset --local-dir {place}"
        return [fetch, f"megatron-entropy data {self.name} {place}{options} --out {out}"]


@functools.cache
def public_sets() -> dict[str, PublicSet]:
    """``name -> set``, training first, in the table's order."""
    table = tomllib.loads(TABLE.read_text(encoding="utf-8"))["set"]
    return {found.name: found for found in map(PublicSet.model_validate, table)}


def how_to_make(path: str | Path) -> str:
    """How the missing file ``path`` is made, and what it is made of, where its name is a known set's; else ''."""
    known = public_sets()
    found = known.get(Path(path).name.removesuffix(".jsonl"))
    if found is None:
        return ""
    lines = [
        command
        for part in found.parts
        if not Path(path).with_name(f"{part}.jsonl").exists()
        for command in known[part].commands()
    ]
    return "\n".join(f"  {line}" for line in [*lines, *found.commands(str(path))])
