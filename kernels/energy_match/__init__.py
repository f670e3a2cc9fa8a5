"""tokopt::energy_match."""
