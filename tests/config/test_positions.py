"""How long prompt and response may be together, from configurations of the published kinds."""

from __future__ import annotations

from typing import Any

import pytest

from megatron_ext.config.positions import max_positions


@pytest.mark.parametrize(
    ("hf", "positions"),
    [
        ({"max_position_embeddings": 4096}, 4096),
        ({"max_position_embeddings": 4096, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}, 4096),
        (  # as the publishers of Qwen2.5 stretch it
            {
                "max_position_embeddings": 32768,
                "rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768},
            },
            131072,
        ),
        (  # stated stretched already
            {
                "max_position_embeddings": 131072,
                "rope_parameters": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768},
            },
            131072,
        ),
        (  # Llama 3.1 states what its rope reaches
            {
                "max_position_embeddings": 131072,
                "rope_scaling": {"rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 8192},
            },
            131072,
        ),
        ({"max_position_embeddings": 2048, "rope_scaling": {"type": "linear", "factor": 2}}, 4096),
        ({"max_position_embeddings": 2048, "rope_scaling": None}, 2048),
        ({}, None),
    ],
)
def test_positions(hf: dict[str, Any], positions: int | None) -> None:
    assert max_positions(hf) == positions
