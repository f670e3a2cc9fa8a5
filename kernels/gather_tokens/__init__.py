"""tokopt::gather_tokens."""
