"""Entropy-controlled reinforcement learning of reasoning models on Megatron-Core."""

from megatron_ext.gpu_libraries import hide_without_gpu

__version__ = "0.1.0"

hide_without_gpu()
