"""Whose functions are in a file."""

DOMAIN, VERSION = "burnish", 1
