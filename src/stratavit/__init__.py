"""StrataViT: turn one pre-trained Vision Transformer into a super-network; slice any size out of it."""

from stratavit.artifacts import load, save
from stratavit.budget import Budget
from stratavit.errors import ArtifactError, BudgetError, StrataViTError, UnsupportedModelError
from stratavit.evaluate import Metrics, evaluate
from stratavit.recipe import Recipe
from stratavit.spec import Spec
from stratavit.supernet import SuperNet
from stratavit.train import train_piad

__version__ = "0.1.0"

__all__ = [
    "ArtifactError",
    "Budget",
    "BudgetError",
    "Metrics",
    "Recipe",
    "Spec",
    "StrataViTError",
    "SuperNet",
    "UnsupportedModelError",
    "evaluate",
    "load",
    "save",
    "train_piad",
]
