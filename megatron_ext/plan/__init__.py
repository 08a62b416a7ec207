"""Memory and time of a recipe before it runs, counted; and the real shards on meta tensors to hold the count against.

A layout is planned from config.json alone, without torch (layout.py).
"""
