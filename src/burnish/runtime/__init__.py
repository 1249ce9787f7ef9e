"""Runs what the schedule built: input signatures, weights that may move, threads. Knows no Op."""
