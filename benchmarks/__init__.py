"""Measurements of vfio-vmbus beside yardsticks in C; `python -m benchmarks` runs them (see harness.py)."""
