"""tokopt::dequantize_keys."""
