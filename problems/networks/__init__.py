"""Recipes for neural networks, one a file: y is the weights of a module, and data come in batches."""
