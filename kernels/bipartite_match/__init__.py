"""tokopt::bipartite_match."""
