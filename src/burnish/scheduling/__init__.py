"""Schedules: progressive optimization that the user steers.

`create_schedule` gives the handle on a model; each primitive (`primitives/`, one file each) changes a part of it, and
leaves a Step in the history. Every step can be undone, and `build` gives the module.
"""

from burnish.scheduling.fused_linears import FusedLinears
from burnish.scheduling.primitives import PRIMITIVES, Primitive, register
from burnish.scheduling.saved import load
from burnish.scheduling.schedule import Group, Schedule, create_schedule
from burnish.scheduling.search import SearchResult, Trial, search_schedules
from burnish.scheduling.step import History, Step
from burnish.scheduling.verifying import VerificationError, Verified

__all__ = [
    "PRIMITIVES",
    "FusedLinears",
    "Group",
    "History",
    "Primitive",
    "Schedule",
    "SearchResult",
    "Step",
    "Trial",
    "VerificationError",
    "Verified",
    "create_schedule",
    "load",
    "register",
    "search_schedules",
]
