"""Families of timm models: taken apart, described, counted, compared and cut."""
