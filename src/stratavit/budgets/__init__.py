"""Budgets, and the sub-network that keeps them."""
