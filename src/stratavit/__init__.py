"""StrataViT: turn one pre-trained Vision Transformer into a super-network; slice any size out of it."""

from stratavit.artifacts import load, save
from stratavit.bench import bench
from stratavit.budget import Bound, Budget
from stratavit.class_names import class_names_of
from stratavit.curve_points import Point
from stratavit.data import image_loader
from stratavit.errors import ArtifactError, BudgetError, StrataViTError, UnsupportedModelError
from stratavit.evaluate import Metrics, evaluate
from stratavit.export import Parity, export
from stratavit.features import knn, zero_shot
from stratavit.finetune import finetune
from stratavit.foreign import as_timm
from stratavit.hf_files import load_transformers
from stratavit.html_report import write_report
from stratavit.hub import from_pretrained, push_to_hub
from stratavit.piad import train_piad
from stratavit.recipe import Recipe
from stratavit.report import curve
from stratavit.spec import Spec
from stratavit.supernet import SuperNet
from stratavit.timing import Setting, Timing, time_model
from stratavit.version import __version__ as __version__
from stratavit.walk import Walk
from stratavit.zoo import dense_model

__all__ = [
    "ArtifactError",
    "Bound",
    "Budget",
    "BudgetError",
    "Metrics",
    "Parity",
    "Point",
    "Recipe",
    "Setting",
    "Spec",
    "StrataViTError",
    "SuperNet",
    "Timing",
    "UnsupportedModelError",
    "Walk",
    "as_timm",
    "bench",
    "class_names_of",
    "curve",
    "dense_model",
    "evaluate",
    "export",
    "finetune",
    "from_pretrained",
    "image_loader",
    "knn",
    "load",
    "load_transformers",
    "push_to_hub",
    "save",
    "time_model",
    "train_piad",
    "write_report",
    "zero_shot",
]
