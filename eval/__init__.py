"""Judging a run: quality, fidelity to the uncached images, MACs, wall-clock time, tables and plots."""
