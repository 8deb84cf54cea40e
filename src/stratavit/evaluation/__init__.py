"""Accuracy and latency of a model."""
