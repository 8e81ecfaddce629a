"""Measurements. `python -m benchmarks` lists them; docs/performance.md holds the results."""
