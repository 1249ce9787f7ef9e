"""Batches of unequal lengths: a Program on padded sequences, and what it becomes on their real tokens alone."""
