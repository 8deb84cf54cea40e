"""StrataViT: turn one pre-trained Vision Transformer into a super-network; slice any size out of it.

Names are loaded when they are first used, so that ``import stratavit`` costs nothing that is not needed.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from stratavit.version import __version__ as __version__

if TYPE_CHECKING:
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

_HOMES = {  # public name -> module that defines it
    "ArtifactError": "errors",
    "Bound": "budgets.amounts",
    "Budget": "budgets.amounts",
    "BudgetError": "errors",
    "Metrics": "evaluation.accuracy",
    "Parity": "interop.export",
    "Point": "evaluation.curve_points",
    "Recipe": "training.recipe",
    "Setting": "evaluation.latency",
    "Spec": "spec",
    "StrataViTError": "errors",
    "SuperNet": "supernet",
    "Timing": "evaluation.latency",
    "UnsupportedModelError": "errors",
    "Walk": "dropout_list.walk",
    "as_timm": "interop.convert",
    "bench": "evaluation.benchmark",
    "class_names_of": "data.class_names",
    "curve": "reports.curve",
    "dense_model": "artifacts.model_loading",
    "evaluate": "evaluation.accuracy",
    "export": "interop.export",
    "finetune": "tasks.finetune",
    "from_pretrained": "reports.hub",
    "image_loader": "data.image_folder",
    "knn": "evaluation.features",
    "load": "artifacts.sub_network",
    "load_transformers": "interop.transformers.folders",
    "push_to_hub": "reports.hub",
    "save": "artifacts.sub_network",
    "time_model": "evaluation.latency",
    "train_piad": "tasks.piad",
    "write_report": "reports.html",
    "zero_shot": "evaluation.features",
}

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


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'stratavit' has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(f"stratavit.{_HOMES[name]}"), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
