"""Derivatives through the steps of an inner iteration."""
