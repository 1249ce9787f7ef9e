"""Triton kernels and the functions that launch them. They know torch and triton and nothing of Ops.

Importing a module of this package imports triton, so the Ops do so only when one of its kernels is wanted.
"""
