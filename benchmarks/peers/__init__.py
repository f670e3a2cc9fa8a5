"""tokopt against other engines on the same machine: images, text, and the machine's limits."""
