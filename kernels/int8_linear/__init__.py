"""A linear layer with weights and activations in 8 bits, as an op of ONNX Runtime: ``tokopt.cpu::Int8Linear``."""
