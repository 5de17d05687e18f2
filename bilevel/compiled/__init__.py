"""Estimates and outer steps as one compiled program each: what `compile=True` runs."""
