"""Measured comparisons, one command each; tables and JSON go to ``benchmarks/results``."""
