"""What couplings and autoregressive layers do to each value."""
