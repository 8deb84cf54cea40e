"""The training engine; it knows no super-network."""
