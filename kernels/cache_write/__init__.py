"""tokopt::cache_write."""
