"""Models of transformers: as timm's, and back."""
