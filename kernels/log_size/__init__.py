"""tokopt::log_size."""
