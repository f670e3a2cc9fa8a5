"""tokopt::fake_quantize."""
