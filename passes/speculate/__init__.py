"""Passes that let a program propose several tokens, verify them in one call, and keep what is right."""
