"""What a recipe may say: its schema, how parents and overrides merge, and checks that need no model. No torch.

A new key is a field of schema.py; a renamed one also gets a line in aliases.py, which answers the old name.
"""
