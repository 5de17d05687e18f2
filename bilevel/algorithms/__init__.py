"""Whole bilevel algorithms as values, one a file."""
