"""Read-only facts about a Program: attention sites, blocks, the token axis, cost, well-formedness."""
