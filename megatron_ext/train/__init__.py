"""A run: the loop, one training step, packing, token weights, resuming.

The trainer knows no method by name: what differs between methods is in megatron_ext/methods.
"""
