"""Checkpoints of a run, readable under every layout: what is trusted (manifest), what a rank writes, how it is resumed.

The format is fixed by ``storage.py`` and the keys by ``model/param_mapping.py``: a change to either must still load the
checkpoint in ``tests/checkpoint``.
"""
