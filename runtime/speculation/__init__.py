"""Speculation: draft trees, accept rules, planners, drafters that need no model, and the host that drives one by them.

All but the last are pure functions of arrays, or a small state of one text; :mod:`.host` has a model verify trees.
"""
