"""Attention and MLP modules that run any prefix of their channels, and blocks that merge tokens."""
