"""Products with the float32 weights of chosen experts, as an op of ONNX Runtime: ``tokopt.cpu::FloatExpertLinear``."""
