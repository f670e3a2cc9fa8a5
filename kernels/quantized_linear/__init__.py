"""A linear layer with weights in 4 or 8 bits, as an op of ONNX Runtime: ``tokopt.cpu::QuantizedLinear``."""
