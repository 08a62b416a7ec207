"""The policy, its reference and its critic on Megatron-Core: built for a layout, loaded, run, and streamed out again.

A new model family is a file in ``architectures/``; what Megatron is told is in ``megatron_config.py`` and
``layers.py``. No module of this folder is imported here: a configuration is read without torch.
"""
