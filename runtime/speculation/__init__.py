"""The host's half of speculation: draft trees, accept rules, planners, and drafters that need no model.

Everything here is a pure function of arrays, or a small state of one text; nothing drives a model.
"""
