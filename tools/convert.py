"""Convert between Megatron checkpoints and Hugging Face model directories, on the CPU, in one process.

    python -m tools.convert to-hf runs/siren-tiny-cpu OUT            the newest valid checkpoint of a run
    python -m tools.convert to-hf runs/siren-tiny-cpu/checkpoints/step_000040 OUT
    python -m tools.convert from-hf MODEL OUT                        weights only, loadable under any layout

A checkpoint of any tensor, pipeline and data layout is read; its files are checked against the manifest first.
Exit codes: 0 done, 2 bad input.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any

from megatron_ext.train.config import Config, ConfigError, ParallelConfig, hf_config
from megatron_ext.train.manifest import CheckpointError, Manifest, newest_valid, verify


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tools.convert", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    to_hf_parser = commands.add_parser("to-hf", help="checkpoint -> Hugging Face directory")
    to_hf_parser.add_argument("checkpoint", type=Path, help="a step_* directory, or a run (its newest valid one)")
    to_hf_parser.add_argument("out", type=Path)
    to_hf_parser.add_argument("--model", type=Path, help="where config and tokenizer come from (default: the run's)")
    from_hf_parser = commands.add_parser("from-hf", help="Hugging Face directory -> Megatron checkpoint of the weights")
    from_hf_parser.add_argument("model", type=Path)
    from_hf_parser.add_argument("out", type=Path)
    options = parser.parse_args(arguments)
    try:
        if options.command == "to-hf":
            to_hf(options.checkpoint, options.out, source=options.model)
        else:
            from_hf(options.model, options.out)
    except (ConfigError, CheckpointError, ValueError) as error:
        print(f"convert: {error}", file=sys.stderr)
        return 2
    print(options.out)
    return 0


def to_hf(checkpoint: Path, out: Path, *, source: Path | None = None) -> None:
    """Export a checkpoint. Raises CheckpointError for a damaged or absent one, ConfigError for a missing model."""
    path, manifest = find(checkpoint)
    source = source or Path(manifest.config["model"]["path"])
    hf_config(source)
    _refuse_to_overwrite(out)
    policy = _one_rank_model(source)
    from megatron_ext.model.export import write_hf
    from megatron_ext.model.hf_weights import stream_weights
    from megatron_ext.train import checkpoint as training_checkpoint

    training_checkpoint.load_model(path, model=policy.chunks)
    weights = stream_weights(policy)
    write_hf(out, weights, source=source, card=model_card(path, manifest))


def from_hf(model: Path, out: Path) -> None:
    """Write the weights of a model directory as a Megatron checkpoint of step 0 below ``out``."""
    hf_config(model)
    _refuse_to_overwrite(out)
    policy = _one_rank_model(model)
    from megatron_ext.model.hf_weights import load_weights
    from megatron_ext.train import checkpoint as training_checkpoint

    load_weights(policy.modules[0], policy.architecture, model)
    config = Config.model_validate({"model": {"path": str(model)}}).model_dump()
    training_checkpoint.save_model(out, model=policy.chunks, config=config, layout=ParallelConfig().model_dump())


def find(checkpoint: Path) -> tuple[Path, Manifest]:
    """The verified checkpoint that a path means: a ``step_*`` directory, a run, or a run's ``checkpoints``."""
    if checkpoint.name.startswith("step_"):
        return checkpoint, verify(checkpoint)
    root = checkpoint / "checkpoints" if (checkpoint / "checkpoints").is_dir() else checkpoint
    found = newest_valid(root)
    if found is None:
        raise CheckpointError(
            f"{checkpoint}: holds no checkpoint; give a run's folder or one of its step_* directories"
        )
    for line in found.refused:
        print(f"convert: {line}", file=sys.stderr)
    return found.path, found.manifest


def model_card(path: Path, manifest: Manifest) -> str:
    """What the export is: where its weights come from and how they were trained."""
    config: dict[str, Any] = manifest.config
    method = json.dumps(config["method"])
    return (
        f"# {config['name']}\n\n"
        f"Exported from {path.name} of run `{config['name']}`: `{config['model']['path']}` after {manifest.step} steps "
        f"of reinforcement learning with verifiable rewards.\n\n"
        f"- method: `{method}`\n- data: `{config['data']['train']}`\n"
        f"- rollouts: {config['rollout']['prompts']} prompts x {config['rollout']['samples']} responses, "
        f"temperature {config['rollout']['temperature']}\n- learning rate: {config['optimizer']['lr']}\n"
        f"- versions: {', '.join(f'{name} {value}' for name, value in manifest.versions.items())}\n"
    )


def _refuse_to_overwrite(out: Path) -> None:
    if out.exists() and any(out.iterdir()):
        raise ConfigError(f"{out}: exists and is not empty; remove it or give another directory")


def _one_rank_model(source: Path):
    """The whole model on this process."""
    import torch
    import torch.distributed as dist

    from megatron_ext import host
    from megatron_ext.model import build
    from megatron_ext.model.hf_config import read_architecture
    from megatron_ext.train import parallel

    host.enter()
    if not dist.is_initialized():
        store = dist.HashStore()  # pyright: ignore[reportPrivateImportUsage]
        dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    parallel.initialize(ParallelConfig(ranks_per_node=1))
    config = hf_config(source)
    name = config.get("dtype") or config.get("torch_dtype") or "float32"
    return build.build_policy(
        read_architecture(config), tensor=1, pipeline=1, sequence=False, dtype=getattr(torch, name)
    )


if __name__ == "__main__":
    os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")  # conversion is for the CPU
    sys.exit(main())
