"""tokopt::top_tokens."""
