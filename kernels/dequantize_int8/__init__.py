"""tokopt::dequantize_int8."""
