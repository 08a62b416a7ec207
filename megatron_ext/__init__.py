"""Entropy-controlled reinforcement learning of reasoning models on Megatron-Core."""

__version__ = "0.1.0"
