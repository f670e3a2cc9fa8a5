"""tokopt::farthest_point."""
