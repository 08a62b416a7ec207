"""What is left out and reported, what the manifest says, what bad input is told: through the command and real files."""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from megatron_ext.config.errors import ConfigError
from megatron_ext.config.loading import load_config
from megatron_ext.config.public_sets import public_sets
from megatron_ext.data.dataset import load_problems
from megatron_ext.types import Problem
from tests.tools.data.conftest import Run, manifest, read, write
from tests.train.whole_run import RECIPES
from tools.data.filters import QUESTION_TYPES, histogram, question_type
from tools.data.solved import Range, SolveCounts
from tools.data.sources import open_source

LONG = (
    "A gardener plants 12 rows of 7 tulips and then 5 rows of 9 roses; how many flowers does the gardener plant in all?"
)


def deepscaler(*pairs: tuple[str, Any]) -> list[dict[str, Any]]:
    return [{"problem": prompt, "answer": answer, "solution": ""} for prompt, answer in pairs]


def test_everything_left_out_is_counted_and_shown(run: Run, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    rows = deepscaler(
        ("What is $1+1$?", "2"),
        ("What  is\n$1+1$?", "2"),
        ("What is $1+1$?", "3"),
        ("No gold here", None),
        ("Nor here", ""),
        (" ", "5"),
        ("Unreadable gold", "\\begin{frac"),
        ("A sentence", "4\\text{ or 5}, \\ldots"),
        ("x" * 200, "7"),
    )
    source, out = write(tmp_path / "d.parquet", rows), tmp_path / "out.jsonl"
    assert run("deepscaler", source, "--out", out, "--max-chars", 100) == 0
    record, told = manifest(out), capsys.readouterr().out
    expected = {"duplicate": 1, "conflicting": 1, "no_gold": 2, "empty": 1, "unparsable_gold": 2, "too_long": 1}
    kept = [row["prompt"] for row in read(out)]
    assert kept == ["What is $1+1$?"]
    assert record["left_out"] == expected and (record["read"], record["kept"]) == (9, 1)
    assert record["golds"] == {"asked": 3, "accepted": 1, "rate": 0.333333}
    for reason, count in expected.items():
        assert f"left out, {reason}: {count}" in told and len(record["examples"][reason]) == count
    assert "d.parquet row 3: the problem of d.parquet row 1 with the answer '3', there '2'" in told
    assert "1 of 9 rows kept; 33.33% of 3 golds verify themselves" in told


def test_a_planted_evaluation_problem_is_found_and_left_out(run: Run, tmp_path: Path) -> None:
    evaluation = tmp_path / "data" / "amc23.jsonl"
    write(
        evaluation,
        [{"id": "amc23-7", "prompt": LONG, "answer": "129"}, {"id": "s", "prompt": "Add 2, 3.", "answer": "5"}],
    )
    rows = deepscaler(
        (f"Read with care. {LONG.replace(' ', '  ').upper()}", "129"),
        ("A gardener plants 12 rows of 7 tulips and then some roses; how many tulips are there?", "84"),
        ("ADD $2$, $3$", "5"),
        ("Add 2, 3, 4.", "9"),
    )
    out = tmp_path / "out.jsonl"
    assert run("deepscaler", write(tmp_path / "d.jsonl", rows), "--out", out, "--against", evaluation) == 0
    assert [row["answer"] for row in read(out)] == ["84", "9"]
    record = manifest(out)
    assert record["left_out"] == {"in_evaluation_set": 2}
    assert [(each["row"], each["id"]) for each in record["overlaps"]] == [
        ("d.jsonl row 1", "deepscaler-1"),
        ("d.jsonl row 3", "deepscaler-3"),
    ]
    assert "13-grams of amc23 amc23-7: '" in record["overlaps"][0]["match"]
    assert record["against"][0]["sha256"] == hashlib.sha256(evaluation.read_bytes()).hexdigest()


def samples(path: Path, right: dict[str, int], count: int = 8) -> Path:
    """As evaluate writes them: a header, then the responses."""
    lines = [
        {"set": "d", "id": name, "sample": i, "text": "", "correct": i < k}
        for name, k in right.items()
        for i in range(count)
    ]
    return write(path, [{"header": {"set": "d"}}, *lines])


def test_solve_rates_choose_problems(run: Run, tmp_path: Path) -> None:
    """The filters of two papers: some right and some wrong of eight; any right of three models' eight."""
    first = tmp_path / "deepscaler.jsonl"
    rows = deepscaler(*((f"What is ${i}+1$?", str(i + 1)) for i in range(1, 6)))
    assert run("deepscaler", write(tmp_path / "d.parquet", rows), "--out", first) == 0
    names = [f"deepscaler-{i}" for i in range(1, 6)]
    one = samples(tmp_path / "a.jsonl", dict(zip(names[:4], (0, 1, 7, 8), strict=True)))
    two = samples(tmp_path / "b.jsonl", dict(zip(names[:4], (0, 0, 0, 0), strict=True)))
    out = tmp_path / "out.jsonl"
    assert run("entropic-math", first, "--out", out, "--solved", one, "--keep-solved", "1..7") == 0
    assert [row["id"] for row in read(out)] == names[1:3]
    assert manifest(out)["left_out"] == {"solved_too_rarely": 1, "solved_too_often": 1, "no_samples": 1}
    assert manifest(out)["right_responses"] == {"1 of 8": 1, "7 of 8": 1}
    assert run("siren-llama-35k", first, "--out", out, "--solved", one, two, "--keep-solved", "1..") == 0
    assert [row["id"] for row in read(out)] == names[1:4]
    assert manifest(out)["right_responses"] == {"1 of 16": 1, "7 of 16": 1, "8 of 16": 1}


def test_counts_that_make_another_filter_are_told() -> None:
    counts = SolveCounts(Counter({"a": 4, "b": 1}), Counter({"a": 4, "b": 4}))
    [told] = counts.doubts(Range(1, 7))
    assert told == "note: problems have at most 4 responses, so that none is solved too often by 1..7"
    assert counts.doubts(Range(1, 3)) == [] == counts.doubts(Range.parse("1.."))
    counts.sampled["c"] = 2
    assert counts.doubts(Range(1, 3)) == ["note: 1 problems have fewer than 4 responses; was their evaluation stopped?"]


def test_sources_of_one_name_are_told_apart(run: Run, tmp_path: Path) -> None:
    """The second has the first's problem in the same row, and one of the same id; solve rates go by the new ids."""
    mapping = ["--map", "prompt=q,answer=a,id=n"]
    for name, rows in {"a": [("1+1", "2")], "b": [("1+1", "3"), ("2+2", "4")]}.items():
        (tmp_path / name).mkdir()
        content = [{"q": prompt, "a": answer, "n": "7"} for prompt, answer in rows]
        write(tmp_path / name / "part.jsonl", content)
    out, sources = tmp_path / "out.jsonl", [tmp_path / name / "part.jsonl" for name in "ab"]
    assert run("mine", *sources, *mapping, "--out", out) == 0
    assert [(row["id"], row["prompt"]) for row in read(out)] == [("mine-7", "1+1"), ("mine-7@2", "2+2")]
    found = manifest(out)
    assert found["left_out"] == {"conflicting": 1}
    assert f"{sources[1]} row 1: the problem of {sources[0]} row 1 with" in found["examples"]["conflicting"][0]
    solved = samples(tmp_path / "s.jsonl", {"mine-7": 0, "mine-7@2": 8})
    assert run("mine", *sources, *mapping, "--out", out, "--solved", solved, "--keep-solved", "1..8") == 0
    assert [row["id"] for row in read(out)] == ["mine-7@2"]
    assert manifest(out)["right_responses"] == {"8 of 8": 1}


def test_a_file_of_a_folder_that_is_read_is_not_written(
    run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "src"
    folder.mkdir()
    source = write(folder / "train.jsonl", deepscaler(("1+1", "2")))
    before = source.read_bytes()
    for name in ("train.jsonl", "new.jsonl"):
        assert run("deepscaler", folder, "--out", folder / name) == 2
        assert "which is read as a whole; give a file elsewhere" in capsys.readouterr().err
    assert source.read_bytes() == before and [path.name for path in folder.iterdir()] == ["train.jsonl"]


def test_the_tables_of_a_folder_are_read_as_text(run: Run, tmp_path: Path) -> None:
    """As one by itself is: 007 is no 7, .50 no .5, and None is a word."""
    folder, out = tmp_path / "src", tmp_path / "out.jsonl"
    folder.mkdir()
    answers = ["007", "0.50", "None", "True"]
    (folder / "train.csv").write_text("q,a\n" + "".join(f"{i}+1?,{each}\n" for i, each in enumerate(answers)))
    found = [row for source in (folder, folder / "train.csv") for row in open_source(source).rows()]
    assert [row["a"] for row in found] == answers * 2
    assert run("mine", folder, "--map", "prompt=q,answer=a", "--out", out) == 0
    assert [row["answer"] for row in read(out)][:2] == ["007", "0.50"]


def test_a_file_of_a_folder_with_other_columns_is_told(
    run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, out = tmp_path / "src", tmp_path / "out.jsonl"
    folder.mkdir()
    for name, header in (("a", "problem"), ("b", "question")):
        (folder / f"{name}.csv").write_text(f"{header},answer\n1+1,2\n")
    assert run("deepscaler", folder, "--out", out) == 2
    assert "cannot be read to its end" in capsys.readouterr().err and not out.exists()


def test_question_types_are_dropped(run: Run, tmp_path: Path) -> None:
    prompts = {
        "Is 7 prime?": "\\text{Yes}",
        "Which is odd? (A) 2 (B) 3": "3",
        "Prove that $n^2=4$ has two solutions and give their product.": "-4",
        "What is $2+9$?": "11",
    }
    kinds = [question_type(Problem("", prompt, answer)) for prompt, answer in prompts.items()]
    assert kinds == [*QUESTION_TYPES, ""]
    out, source = tmp_path / "out.jsonl", write(tmp_path / "d.jsonl", deepscaler(*prompts.items()))
    assert run("deepscaler", source, "--out", out, "--drop", "true-false,choice,proof") == 0
    assert [row["answer"] for row in read(out)] == ["11"]
    assert manifest(out)["left_out"] == {"true-false": 1, "choice": 1, "proof": 1}


def test_prompts_are_measured_in_tokens(run: Run, tmp_path: Path) -> None:
    source = write(tmp_path / "d.jsonl", deepscaler(("1+1", "2"), ("1+1+1+1+1+1+1+1+1+1+1+1+1+1+1+1+1", "17")))
    out, tiny = tmp_path / "out.jsonl", RECIPES / "tiny" / "base"
    assert run("deepscaler", source, "--out", out, "--tokenizer", tiny, "--max-tokens", 10) == 0
    assert [row["answer"] for row in read(out)] == ["2"] and manifest(out)["left_out"] == {"too_long": 1}
    assert manifest(out)["prompt_tokens"]["max"] <= 10
    assert histogram([1, 16, 17, 64, 65]) == {"<= 16": 2, "<= 32": 1, "<= 64": 1, "<= 128": 1}


def test_equal_sources_give_equal_bytes_and_the_manifest_describes_them(run: Run, tmp_path: Path) -> None:
    source = write(tmp_path / "d.parquet", deepscaler(("é $1+1$?", "2"), ("$2+2$?", "4"), ("$2+2$?", "4")))
    names = ("a", "b")
    for name in names:
        (tmp_path / name).mkdir()
        assert run("deepscaler", source, "--out", tmp_path / name / "d.jsonl") == 0
    for file in ("d.jsonl", "d.manifest.json"):
        first, second = ((tmp_path / name / file).read_bytes() for name in names)
        assert first == second
    assert sorted(path.name for path in (tmp_path / "a").iterdir()) == ["d.jsonl", "d.manifest.json"]
    out, record = tmp_path / "a" / "d.jsonl", manifest(tmp_path / "a" / "d.jsonl")
    assert record["output"]["sha256"] == hashlib.sha256(out.read_bytes()).hexdigest()
    assert record["sources"][0]["files"] == [
        {
            "name": "d.parquet",
            "bytes": source.stat().st_size,
            "sha256": hashlib.sha256(source.read_bytes()).hexdigest(),
        }
    ]
    assert "é".encode() in out.read_bytes() and len(load_problems(out, score=None, strict=True)[0]) == 2


def test_a_prepared_file_is_checked(run: Run, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    out = tmp_path / "d.jsonl"
    assert run("deepscaler", write(tmp_path / "s.jsonl", deepscaler(("$1+1$?", "2"))), "--out", out) == 0
    assert run("--check", out) == 0
    assert "1 problems of deepscaler, as its manifest says" in capsys.readouterr().out
    out.write_bytes(out.read_bytes().replace(b'"2"', b'"3"'))
    assert run("--check", out) == 2
    assert "it was changed since it was prepared" in capsys.readouterr().err
    (tmp_path / "d.manifest.json").unlink()
    assert run("--check", out) == 2
    assert "d.manifest.json: cannot be read: No such file" in capsys.readouterr().err


def snapshot(folder: Path) -> Path:
    """A repository of the Hub as ``hf download`` leaves it: two configurations, two splits, notes on the download."""
    rows = {
        (c, s): [{"question": f"{c} {s}: $1+1$?", "answer": "#### 2"}]
        for c in ("main", "other")
        for s in ("train", "test")
    }
    configs = ""
    for config in ("main", "other"):
        configs += f"- config_name: {config}\n  data_files:\n"
        for split in ("train", "test"):
            write(folder / config / f"{split}-00000-of-00001.parquet", rows[config, split])
            configs += f"  - split: {split}\n    path: {config}/{split}-*\n"
    (folder / "README.md").write_text(f"---\nconfigs:\n{configs}---\nA set.\n")
    note = folder / ".cache/huggingface/download/README.md.metadata"
    note.parent.mkdir(parents=True)
    note.write_text(f"{'c' * 40}\netag\n1.0\n")
    return folder


def test_a_snapshot_of_the_hub_is_read_without_a_network(
    run: Run, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    folder, out = snapshot(tmp_path / "gsm8k"), tmp_path / "out.jsonl"

    def prompt(*options: str) -> str:
        assert run("gsm8k", folder, "--out", out, *options) == 0
        [row] = read(out)
        return row["prompt"]

    assert prompt() == "main train: $1+1$?"  # the set's own
    assert manifest(out)["sources"][0]["revision"] == "c" * 40
    assert prompt("--split", "test", "--config", "other") == "other test: $1+1$?"
    capsys.readouterr()
    columns = ("--map", "prompt=question,answer=answer")
    assert run("mine", folder, "--out", out, *columns) == 2
    assert "--config: it has several; choose from main, other" in capsys.readouterr().err
    assert run("mine", folder, "--out", out, *columns, "--config", "main") == 2
    assert "--split: it has several; choose from" in capsys.readouterr().err


def test_columns_of_any_schema_are_mapped(run: Run, tmp_path: Path) -> None:
    rows = [{"turns": [{"role": "user", "content": "$3+3$?"}], "gold": {"value": 6.0}, "topic": "sums"}]
    out = tmp_path / "out.jsonl"
    options = ("--map", "prompt=turns,answer=gold.value,kind=topic")
    assert run("mine", write(tmp_path / "saved", rows), "--out", out, *options) == 0
    assert read(out) == [{"id": "mine-1", "prompt": "$3+3$?", "answer": "6", "verifier": "math", "kind": "sums"}]


@pytest.mark.parametrize(
    ("file", "content", "arguments", "message"),
    [
        (
            "x.jsonl",
            b'{"text": "a", "label": 1}\n',
            [],
            "found the columns text, label; expected problem, answer; or id, ",
        ),
        ("x.jsonl", b"", [], "x.jsonl: has no rows"),
        ("x.jsonl", b"hello\n", [], "x.jsonl: is not a data set"),
        ("x.parquet", b"PAR", [], "x.parquet: is not a data set"),
        ("x.txt", b"hello", [], "x.txt: is not a data set by its name; expected a file (.parquet"),
        ("x/a.md", b"hello", [], "is not a data set"),
        ("y.jsonl", b"", [], "x.jsonl: no such file or folder"),
        ("x.jsonl", b'{"problem": "a", "answer": null}\n', [], "none of the 1 rows of deepscaler can be used"),
        ("x.jsonl", b'{"a": 1}\n', ["--map", "prompt=a,answer=b"], "from the columns a; found prompt=a, answer=b"),
        ("x.jsonl", b'{"a": 1}\n', ["--map", "prompt"], "expected field=column"),
        ("x.jsonl", b'{"a": 1}\n', ["--keep-solved", "1..7"], "--keep-solved and --solved go together"),
        ("x.jsonl", b'{"a": 1}\n', ["--solved", "x.jsonl", "--keep-solved", "7..1"], "expected LOW..HIGH"),
        ("x.jsonl", b'{"a": 1}\n', ["--max-tokens", "5"], "--max-tokens: needs --tokenizer"),
        ("x.jsonl", b'{"a": 1}\n', ["--out", "x.jsonl"], "x.jsonl is read, too"),
        (
            "x.jsonl",
            b'{"problem": "a", "answer": "1"}\n',
            ["--solved", "x.jsonl", "--keep-solved", "1..7"],
            "x.jsonl, line 1: id: Field required; expected lines like",
        ),
        (
            "x.jsonl",
            b'{"problem": "a", "answer": "1"}\n',
            ["--against", "aime24.jsonl"],
            "--against: cannot read aime24.jsonl: No such file or directory; fetch and prepare it with\n  hf ",
        ),
    ],
)
def test_bad_input_exits_2_and_writes_nothing(
    file: str,
    content: bytes,
    arguments: list[str],
    message: str,
    run: Run,
    tmp_path: Path,
    capsys: pytest.CaptureFixture,
) -> None:
    path = tmp_path / file
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(content)
    source = tmp_path / ("x" if "/" in file else "x.jsonl" if file.startswith("y") else file)
    assert run("deepscaler", source, "--out", tmp_path / "out.jsonl", *arguments) == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.glob("out*"))


def test_an_unknown_set_and_no_source(run: Run, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    source = write(tmp_path / "d.jsonl", deepscaler(("a", "1")))
    assert run("deepscalar", source, "--out", tmp_path / "out.jsonl") == 2
    assert "there is no set called 'deepscalar'; expected one of dapo-math-17k" in capsys.readouterr().err
    assert run("deepscaler") == 2
    assert "expected NAME SOURCE... --out FILE" in capsys.readouterr().err


def test_the_list_names_every_set_and_its_commands(run: Run, capsys: pytest.CaptureFixture) -> None:
    assert run("--list") == 0
    told = capsys.readouterr().out
    for name, found in public_sets().items():
        assert f"{name}: {found.use}" in told
        assert all(f"  $ {command}\n" in f"{told}\n" for command in found.commands())
    assert run("--list", "gpqa") == 0
    assert capsys.readouterr().out.count("$ ") == 2


def test_a_recipe_without_its_data_says_how_to_make_it(tmp_path: Path) -> None:
    recipe = RECIPES / "siren" / "siren-tiny-cpu.toml"
    with pytest.raises(ConfigError) as error:
        load_config(recipe, [f'data.train="{tmp_path}/entropic-math.jsonl"'])
    lines = str(error.value).splitlines()
    assert (
        "  megatron-entropy data orz-57k data/hub/orz-57k/orz_math_57k_collected.json --out data/orz-57k.jsonl" in lines
    )
    assert any(line.endswith(f"--out {tmp_path}/entropic-math.jsonl") for line in lines)
    with pytest.raises(ConfigError) as error:
        load_config(recipe, [f'data.train="{tmp_path}/unknown.jsonl"'])
    assert "hf download" not in str(error.value)


def test_the_sets_of_recipes_and_suites_are_known() -> None:
    """So that a user without the file is told what to do."""
    files = [path for path in RECIPES.rglob("*.toml") if "tiny" not in path.parts]
    named = {name for path in files for name in re.findall(r'= "(?:\.\./)*data/([\w-]+)\.jsonl"', path.read_text())}
    assert named and named <= set(public_sets()), sorted(named - set(public_sets()))
