"""Modules of torch as functions of their parameters."""
