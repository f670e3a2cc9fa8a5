"""Keys and values: which tokens' stay in the cache."""
