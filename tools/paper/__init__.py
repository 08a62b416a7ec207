"""A paper's tables and figures: which recipe makes each row, what is there of it, and our number beside the published.

``recipes/papers/<paper>/tables.toml`` says it all (tables.py); this folder knows no paper and no method by its name.
"""
