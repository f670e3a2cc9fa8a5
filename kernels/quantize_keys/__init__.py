"""tokopt::quantize_keys."""
