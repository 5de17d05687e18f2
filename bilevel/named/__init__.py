"""Estimators by name: with safe defaults, for a budget of oracle calls, or chosen for an accuracy."""
