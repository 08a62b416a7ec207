"""Distributed checkpoints: written atomically with a manifest of hashes, read under any layout.

Runs resume from what lies on disks already: a change of format must still read the older ones.
"""
