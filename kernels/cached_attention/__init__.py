"""Attention over a cache that it writes into first, as an op of ONNX Runtime: ``tokopt.cpu::CachedAttention``."""
