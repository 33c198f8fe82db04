"""Layers that replace vectors by entries of a codebook."""
