"""What a run tells: metrics.jsonl, the live display, alarms, trackers, statistics of an evaluation.

Nothing here can stop or slow a run, except an alarm that the recipe allows to.
"""
