"""Looks at models, and at what a Schedule recorded; changes nothing."""

from burnish.report.report import Report

__all__ = ["Report"]
