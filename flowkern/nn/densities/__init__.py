"""Distributions, and what is made of a bijection and a distribution."""
