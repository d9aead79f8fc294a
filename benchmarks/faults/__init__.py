"""Faults on purpose: what is injected into runs, what comes of it, and whether that is as promised.

Each module is a command, ``python -m benchmarks.faults.kills``; docs/reliability.md has them all.
"""
