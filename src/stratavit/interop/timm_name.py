"""What a ``config.json`` names where timm's own arguments do not describe a model."""

NAME = "stratavit_vit"  # ``architecture``: the name in timm's registry
KEY = "stratavit"  # of ``model_args``: the description of the model, but for timm's arguments
FORMAT_VERSION = 1  # of what is under it
