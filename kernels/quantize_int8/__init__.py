"""tokopt::quantize_int8."""
