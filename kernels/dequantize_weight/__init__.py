"""tokopt::dequantize_weight."""
