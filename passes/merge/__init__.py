"""Token merging: removed tokens are averaged into the ones that stay."""
