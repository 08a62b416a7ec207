"""Evaluation of Hugging Face model directories: on a file of problems, or on all sets of a paper's suite.

``command.py`` is the command line, ``model.py`` evaluates one model, ``suite.py`` reads a suite, and
``suite_results.py`` puts its numbers together. What other tools use is named here.
"""

from __future__ import annotations

from .command import main
from .results import load_evaluations, save_evaluation, summary
from .sampling import Engine, Pool, measure
from .settings import Settings

__all__ = [
    "Engine",
    "Pool",
    "Settings",
    "load_evaluations",
    "main",
    "measure",
    "save_evaluation",
    "summary",
]
