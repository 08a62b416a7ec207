"""Analyses of models and runs: each writes a figure and the numbers behind it.

An analysis is a module with ``arguments(parser)`` and ``analyze(options, console) -> Result``, and an entry in
``registry.py``. What it reads goes through ``inputs.py`` (files), ``scored.py`` (responses token by token) or
``counts.py`` (right answers by problem); how figures look is in ``figures.py``.
"""
