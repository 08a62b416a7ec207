"""A model directory that lacks what every engine needs is told so."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from megatron_ext.rollout.model_files import eos_ids, load_tokenizer

BASE = Path(__file__).parents[2] / "recipes" / "tiny" / "base"


def test_a_model_directory_without_tokenizer_or_end_of_sequence_is_refused(tmp_path: Path) -> None:
    shutil.copytree(BASE, tmp_path / "model")
    for name in ("config.json", "generation_config.json"):
        file = tmp_path / "model" / name
        if file.is_file():
            file.write_text(json.dumps({k: v for k, v in json.loads(file.read_text()).items() if k != "eos_token_id"}))
    with pytest.raises(ValueError, match="no eos_token_id"):
        eos_ids(tmp_path / "model")
    (tmp_path / "model" / "tokenizer.json").unlink()
    with pytest.raises(ValueError, match=r"holds no tokenizer, expected tokenizer\.json or one of"):
        load_tokenizer(tmp_path / "model")
