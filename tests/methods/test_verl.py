"""Clip-Cov and KL-Cov equal verl's own functions, whose numbers ``record_verl.py`` recorded."""

from __future__ import annotations

import json

import pytest
import torch

from tests.methods.cases import Case, run
from tests.methods.record_verl import RECORD, RUNS


@pytest.mark.parametrize("name", RUNS)
def test_loss_and_gradient_are_verls(name: str) -> None:
    case, theirs = Case(), json.loads(RECORD.read_text())[name]
    ours = run(case, RUNS[name])
    assert ours.loss == pytest.approx(theirs["loss"], rel=1e-6)
    # as a loss linear in the log-probs, verl's derivatives give verl's gradient of the logits
    linear = (case.logp(case.logits) * torch.tensor(theirs["gradient"], dtype=torch.float64)).sum()
    expected = case.gradient(linear)
    assert float((ours.gradient - expected).norm() / expected.norm()) < 1e-6
