"""The description of a metric: the trainer's are in metrics/glossary.py, a method's on its own page. No torch."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Metric:
    """One key of ``metrics.jsonl``, or with a ``<part>`` in its name a family of keys.

    ``good`` says where the value should be; ``low`` and ``high`` what it means and what to do when it is below or
    above. Metrics of one ``title`` are drawn in one chart of the report, below the heading ``section``.
    """

    name: str
    section: str
    title: str
    unit: str
    meaning: str
    good: str = ""
    low: str = ""
    high: str = ""
    short: str = ""  # its name in the live table; "": not shown there
    adds_up: bool = False  # the metrics of this title are parts of a whole
