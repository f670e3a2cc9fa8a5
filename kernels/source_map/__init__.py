"""tokopt::source_map."""
