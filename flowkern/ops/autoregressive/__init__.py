"""Masked networks whose outputs see only earlier inputs: their degrees, and the inverse of autoregressive flows."""
