"""Attention over a cache that is written in the same step, as an op of ONNX Runtime: ``tokopt.cpu::CachedAttention``."""
