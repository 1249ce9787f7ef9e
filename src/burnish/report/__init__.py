"""Reads what the schedule recorded; changes nothing."""

from burnish.report.report import Report

__all__ = ["Report"]
