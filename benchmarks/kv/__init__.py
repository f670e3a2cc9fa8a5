"""KV eviction: what each policy costs in quality, and what it saves in time and bytes."""
