"""Depth as data: rows that leave early, and models with fewer blocks."""
