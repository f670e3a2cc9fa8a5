"""Attacks on everything that tokopt reads, writes and takes: ``python -m tests.attack --cases 5000``.

A case follows from its kind, the seed and its number. It runs in a process of its own kind, which may neither crash nor
hang; it ends in a refusal (a TokoptError of one sentence) or in what the undamaged thing gives, and in nothing else.
"""
