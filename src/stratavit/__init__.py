"""StrataViT: turn one pre-trained Vision Transformer into a super-network; slice any size out of it."""

from stratavit.artifacts.model_loading import dense_model
from stratavit.artifacts.sub_network import load, save
from stratavit.budgets.amounts import Bound, Budget
from stratavit.data.class_names import class_names_of
from stratavit.data.image_folder import image_loader
from stratavit.dropout_list.walk import Walk
from stratavit.errors import ArtifactError, BudgetError, StrataViTError, UnsupportedModelError
from stratavit.evaluation.accuracy import Metrics, evaluate
from stratavit.evaluation.benchmark import bench
from stratavit.evaluation.curve_points import Point
from stratavit.evaluation.features import knn, zero_shot
from stratavit.evaluation.latency import Setting, Timing, time_model
from stratavit.interop.convert import as_timm
from stratavit.interop.export import Parity, export
from stratavit.interop.transformers.folders import load_transformers
from stratavit.reports.curve import curve
from stratavit.reports.html import write_report
from stratavit.reports.hub import from_pretrained, push_to_hub
from stratavit.spec import Spec
from stratavit.supernet import SuperNet
from stratavit.tasks.finetune import finetune
from stratavit.tasks.piad import train_piad
from stratavit.training.recipe import Recipe
from stratavit.version import __version__ as __version__

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
