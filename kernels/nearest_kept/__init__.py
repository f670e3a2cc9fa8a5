"""tokopt::nearest_kept."""
