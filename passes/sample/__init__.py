"""Passes that let a program draw the next token itself."""
