"""Local copies of data sets: a file, a folder of files, what ``save_to_disk`` wrote, a snapshot of a Hub repository.

Read with Hugging Face ``datasets``, streamed and offline; nothing is written into its cache.
"""

from __future__ import annotations

import csv
import logging
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_ext.config.errors import ConfigError

READERS = {".parquet": "parquet", ".arrow": "arrow", ".json": "json", ".jsonl": "json", ".csv": "csv", ".tsv": "csv"}
EXPECTED = (
    f"a file ({', '.join(READERS)}), a folder of such files, what save_to_disk wrote, or a snapshot of a Hub repository"
)
REVISION = re.compile(r"[0-9a-f]{40}")
Row = dict[str, Any]


@dataclass(frozen=True)
class Source:
    """A data set that has been opened. ``num_rows`` is None where only reading all of it would tell."""

    path: Path
    columns: tuple[str, ...]
    num_rows: int | None
    files: tuple[Path, ...]
    parts: tuple[Any, ...]  # datasets.Dataset or IterableDataset, one for each configuration

    def rows(self) -> Iterator[Row]:
        """Raises ConfigError where a row cannot be read."""
        try:
            for part in self.parts:
                yield from part
        except Exception as error:  # pyarrow's, of every kind
            raise ConfigError(f"{self.path}: cannot be read to its end: {_first_line(error)}") from error


def open_source(
    path: Path, *, split: str = "", configs: Sequence[str] = (), usual: tuple[str, Sequence[str]] = ("", ())
) -> Source:
    """Opens ``path`` and reads its first row.

    ``split`` and ``configs`` choose where a folder has several; ``usual`` are the set's own, taken where it has them
    and nothing else is asked for. Raises ConfigError for what is no data set, is empty, or leaves the choice open.
    """
    if not os.path.exists(path):
        raise ConfigError(f"{path}: no such file or folder; expected {EXPECTED}")
    path = _snapshot(path)
    try:
        parts = _from_folder(path, split, configs, usual) if path.is_dir() else [_from_files([path])]
        columns = _columns(parts)
    except ConfigError:
        raise
    except StopIteration:  # of a JSON file without a line
        columns, parts = (), []
    except Exception as error:  # of datasets and pyarrow
        raise ConfigError(f"{path}: is not a data set: {_first_line(error)}; expected {EXPECTED}") from error
    if not columns:
        raise ConfigError(f"{path}: has no rows")
    files = tuple(_files(path))
    return Source(path, columns, _num_rows(parts, files), files, tuple(parts))


def revision_of(path: Path) -> str:
    """The commit of the Hub repository that ``path`` is a copy of, where the download says so, or ''."""
    for part in reversed(path.absolute().parts):
        if REVISION.fullmatch(part):
            return part
    for note in sorted(path.glob(".cache/huggingface/download/**/*.metadata")):
        first = note.read_text(encoding="utf-8", errors="replace").partition("\n")[0].strip()
        if REVISION.fullmatch(first):
            return first
    return ""


def _datasets() -> Any:
    """The library, told to fetch nothing and to be quiet."""
    os.environ |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
    import datasets

    datasets.disable_progress_bars()
    logging.getLogger("datasets").setLevel(logging.CRITICAL)  # what it logs, it raises
    return datasets


def _snapshot(path: Path) -> Path:
    """Of a repository in the Hub's cache (``datasets--owner--name``) its only snapshot; else ``path``."""
    found = sorted((path / "snapshots").glob("*")) if path.is_dir() else []
    if len(found) > 1:
        raise ConfigError(f"{path}: has {len(found)} snapshots; give one of {', '.join(map(str, found))}")
    return found[0] if found else path


def _from_files(files: Sequence[Path]) -> Any:
    readers = {READERS.get(file.suffix.lower()) for file in files}
    if len(readers) != 1 or None in readers:
        raise ConfigError(f"{files[0]}: is not a data set by its name; expected {EXPECTED}")
    [reader] = readers
    options = _as_text(files[0]) if reader == "csv" else {}
    names = [str(file) for file in files]
    return _datasets().load_dataset(reader, data_files=names, split="train", streaming=True, **options)


def _as_text(file: Path) -> dict[str, Any]:
    """How a table of texts is read: 007 is no 7, and an empty cell no NaN."""
    separator = "\t" if file.suffix.lower() == ".tsv" else ","
    with file.open(newline="", encoding="utf-8-sig") as lines:
        header = next(csv.reader(lines, delimiter=separator), [])
    library = _datasets()
    features = library.Features({name: library.Value("string") for name in header})
    return {"features": features, "keep_default_na": False, "sep": separator}


def _from_folder(folder: Path, split: str, configs: Sequence[str], usual: tuple[str, Sequence[str]]) -> list[Any]:
    library = _datasets()
    if (folder / "dataset_dict.json").exists():
        splits = library.load_from_disk(str(folder))
        return [splits[_chosen(folder, "--split", split, list(splits), usual[0])]]
    if (folder / "state.json").exists():
        return [library.load_from_disk(str(folder))]
    files = list(_files(folder))
    if files and all(file.suffix == ".arrow" for file in files):
        return [_from_files(files)]
    known = library.get_dataset_config_names(str(folder))
    wanted = list(configs) or [name for name in usual[1] if name in known]
    if not wanted:
        wanted = [_chosen(folder, "--config", "", known)]
    parts = []
    for name in wanted:
        name = _chosen(folder, "--config", name, known)
        splits = library.get_dataset_split_names(str(folder), name)
        found = _chosen(folder, "--split", split, splits, usual[0])
        by_split = library.load_dataset_builder(str(folder), name).config.data_files or {}
        files = [Path(file) for file in by_split.get(found, ())]
        if {READERS.get(file.suffix.lower()) for file in files} == {"csv"}:
            parts.append(_from_files(files))  # as a table by itself is read
        else:
            parts.append(library.load_dataset(str(folder), name, split=found, streaming=True))
    return parts


def _chosen(folder: Path, option: str, wanted: str, known: Sequence[str], usual: str = "") -> str:
    if wanted in known:
        return wanted
    if not wanted and (len(known) == 1 or usual in known):
        return usual if usual in known else known[0]
    found = f"there is none called {wanted!r}" if wanted else "it has several"
    raise ConfigError(f"{folder}: {option}: {found}; choose from {', '.join(known)}")


def _columns(parts: Sequence[Any]) -> tuple[str, ...]:
    """Those of the first row, in their order; none without a row."""
    for part in parts:
        for row in part:
            return tuple(row)
    return ()


def _num_rows(parts: Sequence[Any], files: Sequence[Path]) -> int | None:
    """Where it can be told without reading: of what lies on disk, and of a single parquet file."""
    if all(hasattr(part, "__len__") for part in parts):
        return sum(map(len, parts))
    if len(files) == 1 and files[0].suffix == ".parquet":
        from pyarrow.parquet import read_metadata

        return read_metadata(files[0]).num_rows
    return None


def _files(path: Path) -> Iterator[Path]:
    """The data files of a source, in the order of their names, without hidden folders."""
    if not path.is_dir():
        yield path
        return
    for file in sorted(path.rglob("*")):
        hidden = any(part.startswith(".") for part in file.relative_to(path).parts)
        if not hidden and file.suffix.lower() in READERS and file.is_file():
            yield file


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip()}".partition("\n")[0][:300]
