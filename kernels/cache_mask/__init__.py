"""tokopt::cache_mask."""
