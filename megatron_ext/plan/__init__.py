"""What a recipe needs of a cluster, computed from it and ``config.json``: memory, groups, time. No torch.

Numbers that a measurement can replace are constants of ``device.py`` and ``speed.py``. ``meta_build.py`` alone needs
torch: it builds the real shards, to check the rest.
"""
