"""Entropy-controlled reinforcement learning of reasoning models on Megatron-Core."""

from megatron_ext.gpu_libraries import hide_from_megatron

__version__ = "0.1.0"

hide_from_megatron()
