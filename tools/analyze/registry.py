"""All analyses by name: their module, what they show and an example. A new one is a module and a line here."""

from __future__ import annotations

from typing import NamedTuple


class Analysis(NamedTuple):
    """``inputs`` says in words what stands behind the name on the command line."""

    module: str
    summary: str
    inputs: str
    example: str


TOKEN_INPUTS = "models (with --samples and --data) or folders of runs"
COUNT_INPUTS = "samples (.jsonl), evaluations (.json) or folders of runs with one"
SCORED = "--samples samples.jsonl --data eval.jsonl"

ANALYSES = {
    "entropy-histogram": Analysis(
        "entropy_histogram", "histogram of token entropy, of one or several models", TOKEN_INPUTS,
        f"entropy-histogram BASE RUN/hf {SCORED} --labels before after",
    ),
    "tokens": Analysis(
        "tokens", "most frequent tokens above an entropy quantile, or among a method's selected ones", TOKEN_INPUTS,
        f"tokens RUN/hf {SCORED} --method siren",
    ),
    "first-tokens": Analysis(
        "first_tokens", "distribution of a response's first token", "models (with --data) or folders of runs",
        "first-tokens BASE RUN/hf --data eval.jsonl",
    ),
    "perplexity": Analysis(
        "perplexity", "perplexity of each model's responses under a base model", "samples (.jsonl), one for each model",
        "perplexity before.jsonl after.jsonl --base BASE --data eval.jsonl",
    ),
    "pivotal": Analysis(
        "pivotal", "entropy of pivotal words and reflective sentences; psi / A of the entropy advantage", TOKEN_INPUTS,
        f"pivotal RUN/hf {SCORED}",
    ),
    "pass-at-k": Analysis(
        "pass_at_k", "pass@k curves with 95 % intervals", COUNT_INPUTS, "pass-at-k RUN/evaluation.json",
    ),
    "entropy-accuracy": Analysis(
        "entropy_accuracy", "entropy against accuracy over a run", "folders of runs", "entropy-accuracy RUN_A RUN_B",
    ),
    "levels": Analysis(
        "levels", "accuracy by level, kind or set of problem", COUNT_INPUTS, "levels RUN/evaluation.json --by kind",
    ),
    "flips": Analysis(
        "flips", "problems that one of two models solves and the other does not", COUNT_INPUTS,
        "flips before.jsonl after.jsonl --data eval.jsonl",
    ),
}  # fmt: skip
