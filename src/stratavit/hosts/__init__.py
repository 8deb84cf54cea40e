"""A ViT inside a larger model: found, calibrated through that model, cut in place."""
