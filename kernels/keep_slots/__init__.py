"""tokopt::keep_slots."""
