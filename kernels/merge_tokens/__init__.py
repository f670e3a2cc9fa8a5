"""tokopt::merge_tokens."""
