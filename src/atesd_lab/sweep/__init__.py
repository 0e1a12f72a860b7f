"""Grids of runs: plans, cells, jobs, their tables and page."""
