"""Planners: which tree to verify next."""
