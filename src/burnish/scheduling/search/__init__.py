"""Searching for the best schedule: choices are tried with real measurements, within a bound on memory.

`search_schedules` (search.py) asks a strategy what to try next, has a Runner measure that, keeps each Trial in a file.
"""

from burnish.scheduling.search.result import SearchResult
from burnish.scheduling.search.search import search_schedules
from burnish.scheduling.search.trial import Trial

__all__ = ["SearchResult", "Trial", "search_schedules"]
