"""What the packages share: how an op is registered and served, and the checks, splits and scale maps that ops and layers take."""
