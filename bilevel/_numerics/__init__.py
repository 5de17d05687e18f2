"""Numerical methods that several rooms share, each once."""
