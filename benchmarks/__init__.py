"""Benchmarks beside the peers: `python -m benchmarks`. What they measure and how to read it: docs/performance.md."""
