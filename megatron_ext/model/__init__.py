"""Hugging Face configurations and weights to Megatron and back, and packed micro-batches to token statistics.

Beside checkpoint, plan and cpu_compat.py, Megatron-Core is imported here alone.
"""
