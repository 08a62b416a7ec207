"""Benchmarks that check before they time.

    megatron-entropy bench ops [--device cpu|cuda] [--tp N] [--tokens 256] [--vocab 151936 32000] [--dtype float32]
    megatron-entropy bench ops --count      launches, synchronisations, bytes and compiled kernels, on any machine
    megatron-entropy bench ops --replay     log-probabilities on a sampler's support (tools/bench/replay.py)
    megatron-entropy bench rollout [--engines hf vllm vllm_server] [--steps 8]        (tools/bench/rollout.py)
    megatron-entropy bench step [--sizes tiny large] [--steps 24]   beside TRL's GRPOTrainer   (tools/bench/step.py)
    megatron-entropy bench balance [--ranks 64] [--lengths RUN]     what ranks wait, simulated (tools/bench/balance.py)
    megatron-entropy bench checkpoint [--layers 10]            what a save costs the step (tools/bench/checkpoint.py)

Writes ``ops-<device>-tp<N>.json`` and ``.svg``, ``replay-<device>-tp<N>.json``, ``rollout.json``, ``step.json``,
``balance.json`` or ``checkpoint.json`` to ``runs/bench``. A result that is wrong ends the run before any speed is
printed. Peers that are not installed are named as such: ``make bench`` runs the operators in an environment that has
them, ``make .venv-vllm/.installed`` makes the one with vLLM and ``make .venv-trl/.installed`` the one with TRL.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from pathlib import Path

from megatron_ext.config.errors import ConfigError
from megatron_ext.config.shipped import find
from megatron_ext.rollout.registry import ENGINES

from .. import module_of
from ..arguments import command_parser, whole_number
from ..ranks import launched, run_ranks


def main(arguments: Sequence[str]) -> int:
    parser = command_parser("bench", __doc__)
    parser.add_argument("what", choices=["ops", "rollout", "step", "balance", "checkpoint"])
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="(%(default)s)")
    parser.add_argument("--tp", type=int, default=1, help="ranks that share the vocabulary, all on this machine")
    parser.add_argument("--tokens", type=int, help="token positions (256; 2048 of --replay)")
    parser.add_argument("--vocab", type=int, nargs="+", default=[151_936, 32_000], help="tokens of the vocabulary")
    parser.add_argument("--dtype", nargs="+", choices=["float32", "bfloat16"], default=["float32", "bfloat16"])
    parser.add_argument("--top-p", type=float, default=0.8, help="of the nucleus and of --replay (%(default)s)")
    parser.add_argument("--top-k", type=int, default=0, help="of --replay; 0: all tokens")
    parser.add_argument("--repeat", type=int, default=9, help="interleaved repetitions; medians are reported")
    parser.add_argument(
        "--deterministic", action="store_true", help="of ops and step: time them with deterministic statistics too"
    )
    parser.add_argument(
        "--count", action="store_true", help="of ops: count what a GPU would be asked for, time nothing"
    )
    parser.add_argument("--replay", action="store_true", help="of ops: time sampling replay")
    parser.add_argument("--out", default="runs/bench", help="folder (%(default)s)")
    parser.add_argument("--engines", nargs="+", choices=ENGINES, default=list(ENGINES), help="of rollout")
    parser.add_argument(
        "--steps", type=whole_number(3), help="of every run, two of them uncounted (8 of rollout, 24 of step)"
    )
    parser.add_argument("--sizes", nargs="+", choices=["tiny", "large"], default=["tiny"], help="of step (%(default)s)")
    parser.add_argument("--only", nargs="+", default=["*"], metavar="RUN", help="of step: these runs, besides TRL's")
    parser.add_argument("--rounds", type=whole_number(1), default=1, help="of step: times that all runs are made")
    parser.add_argument("--peer", default=".venv-trl", help="of step: TRL's environment (%(default)s)")
    parser.add_argument("--compile", action="store_true", help="of rollout: vLLM compiles")
    whole = whole_number(1)
    parser.add_argument("--ranks", type=whole, default=64, help="of balance: data-parallel ranks (%(default)s)")
    parser.add_argument("--samples", type=whole, default=8, help="of balance: responses of a group (%(default)s)")
    parser.add_argument("--longest", type=whole, default=8192, help="of balance: tokens of a response (%(default)s)")
    parser.add_argument(
        "--lengths", metavar="RUN", help="of balance: folder of a run whose responses' lengths are taken"
    )
    parser.add_argument(
        "--model", type=Path, help="of balance and checkpoint: folder of a config.json (qwen2.5-7b, qwen2.5-math-1.5b)"
    )
    parser.add_argument("--layers", type=whole, default=10, help="of checkpoint: layers of the model (%(default)s)")
    options = parser.parse_args(arguments)
    options.tokens = options.tokens or (2048 if options.replay else 256)
    options.steps = options.steps or (24 if options.what == "step" else 8)
    if options.what in ("step", "balance", "checkpoint"):
        default = "qwen2.5-math-1.5b" if options.what == "checkpoint" else "qwen2.5-7b"
        options.model = options.model or find(Path("recipes/models") / default)
        run_it = importlib.import_module(f"{__package__}.{options.what}").run
        try:
            return run_it(options)
        except ConfigError as error:
            print(f"bench: {error}", file=sys.stderr)
            return 2
    if options.what == "rollout":
        from .rollout import run as run_rollout

        return run_rollout(options)
    if options.count:
        from .count import run as run_count

        return run_count(options)
    if options.tp > 1 and not launched():
        return run_ranks(module_of("bench"), arguments, options.tp)
    if options.replay:
        from .replay import run as run_replay

        return run_replay(options)
    from .ops import run

    return run(options)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
