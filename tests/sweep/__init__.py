"""The sweep: every causal language model and every encoder of transformers, captured, exported and run beside itself.

``python -m tests.sweep`` builds each class small and random, in a process of its own, and writes what became of it to
``tests/sweep/outcomes.json`` and ``docs/models.md``.
"""
