"""Curves, pictures, pages, model cards and the hub."""
