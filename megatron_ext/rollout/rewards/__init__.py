"""Scores of responses, computed in worker processes with limits, because answers are untrusted input."""
