"""What a compressed model comes to: quality, layers, time, objectives and goals."""
