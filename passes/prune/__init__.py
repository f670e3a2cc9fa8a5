"""Token pruning: removed tokens are dropped."""
