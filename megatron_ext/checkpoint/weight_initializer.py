"""Where a run's models get their first weights from: model.path's safetensors or, with model.weights, a checkpoint."""

from __future__ import annotations

import hashlib
from pathlib import Path

from megatron.core.models.gpt import GPTModel

from megatron_ext.checkpoint import checkpoint, manifest
from megatron_ext.checkpoint.full_tensors import CheckpointTensors
from megatron_ext.config.schema import ModelConfig
from megatron_ext.model.architectures import Architecture
from megatron_ext.model.hf_weights import load_weights, open_weights
from megatron_ext.model.reference import identity


class WeightInitializer:
    """Fills policy, reference and critic alike. The checkpoint may be of any layout; it is verified once, here.

    Raises CheckpointError on all ranks if it is damaged or holds another model's weights, ValueError for safetensors
    that are not the architecture's.
    """

    def __init__(self, model: ModelConfig, architecture: Architecture) -> None:
        self.model, self.architecture = model, architecture
        if model.weights:
            path = Path(model.weights)
            found = checkpoint.verify(path)
            CheckpointTensors(path).check_policy(architecture, found.layout.get("tensor", 1))
        else:
            open_weights(model.path, architecture)

    def fill(self, modules: list[GPTModel]) -> None:
        """Collective. Raises ValueError (CheckpointError, with model.weights) naming what does not fit."""
        if self.model.weights:
            checkpoint.load_model(Path(self.model.weights), modules)
        else:
            for module in modules:
                load_weights(module, self.architecture, self.model.path)


def weights_identity(model: ModelConfig) -> str:
    """What tells one run's first weights from another's."""
    if not model.weights:
        return identity(model.path)
    return hashlib.sha256((Path(model.weights) / manifest.MANIFEST).read_bytes()).hexdigest()
