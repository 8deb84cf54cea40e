"""StrataViT: turn one pre-trained Vision Transformer into a super-network; slice any size out of it.

Names are loaded when they are first used, so that ``import stratavit`` costs nothing that is not needed.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from stratavit.interop.timm_registration import register_with_timm as _register_with_timm
from stratavit.version import __version__ as __version__

if TYPE_CHECKING:
    from stratavit.artifacts.model_loading import dense_model as dense_model
    from stratavit.artifacts.sub_network import load as load
    from stratavit.artifacts.sub_network import save as save
    from stratavit.budgets.amounts import Bound as Bound
    from stratavit.budgets.amounts import Budget as Budget
    from stratavit.data.class_names import class_names_of as class_names_of
    from stratavit.data.image_folder import image_loader as image_loader
    from stratavit.dropout_list.walk import Walk as Walk
    from stratavit.errors import ArtifactError as ArtifactError
    from stratavit.errors import BudgetError as BudgetError
    from stratavit.errors import StrataViTError as StrataViTError
    from stratavit.errors import UnsupportedModelError as UnsupportedModelError
    from stratavit.evaluation.accuracy import Metrics as Metrics
    from stratavit.evaluation.accuracy import evaluate as evaluate
    from stratavit.evaluation.benchmark import bench as bench
    from stratavit.evaluation.curve_points import Point as Point
    from stratavit.evaluation.features import knn as knn
    from stratavit.evaluation.features import zero_shot as zero_shot
    from stratavit.evaluation.latency import Setting as Setting
    from stratavit.evaluation.latency import Timing as Timing
    from stratavit.evaluation.latency import time_model as time_model
    from stratavit.evaluation.output_agreement import Agreement as Agreement
    from stratavit.evaluation.output_agreement import compare_outputs as compare_outputs
    from stratavit.evaluation.probe import linear_probe as linear_probe
    from stratavit.hosts.converting import convert_part as convert_part
    from stratavit.hosts.part_net import PartNet as PartNet
    from stratavit.hosts.sizes import part_sizes as part_sizes
    from stratavit.hosts.sizes import resize_parts as resize_parts
    from stratavit.interop.export import export as export
    from stratavit.interop.libraries import as_timm as as_timm
    from stratavit.interop.parity import Parity as Parity
    from stratavit.interop.transformers.folders import load_transformers as load_transformers
    from stratavit.reports.curve import curve as curve
    from stratavit.reports.html import write_report as write_report
    from stratavit.reports.hub import from_pretrained as from_pretrained
    from stratavit.reports.hub import push_to_hub as push_to_hub
    from stratavit.spec import Spec as Spec
    from stratavit.supernet import SuperNet as SuperNet
    from stratavit.tasks.convert import compress as compress
    from stratavit.tasks.convert import convert as convert
    from stratavit.tasks.finetune import finetune as finetune
    from stratavit.tasks.lightning_callback import SuperNetLightningCallback as SuperNetLightningCallback
    from stratavit.tasks.piad import train_piad as train_piad
    from stratavit.tasks.recover import recover as recover
    from stratavit.tasks.trainer_callback import SuperNetTrainerCallback as SuperNetTrainerCallback
    from stratavit.training.recipe import Recipe as Recipe

_NAMES = {  # module -> public names that it defines
    "artifacts.model_loading": "dense_model",
    "artifacts.sub_network": "load save",
    "budgets.amounts": "Bound Budget",
    "data.class_names": "class_names_of",
    "data.image_folder": "image_loader",
    "dropout_list.walk": "Walk",
    "errors": "ArtifactError BudgetError StrataViTError UnsupportedModelError",
    "evaluation.accuracy": "Metrics evaluate",
    "evaluation.benchmark": "bench",
    "evaluation.curve_points": "Point",
    "evaluation.features": "knn zero_shot",
    "evaluation.latency": "Setting Timing time_model",
    "evaluation.output_agreement": "Agreement compare_outputs",
    "evaluation.probe": "linear_probe",
    "hosts.converting": "convert_part",
    "hosts.part_net": "PartNet",
    "hosts.sizes": "part_sizes resize_parts",
    "interop.export": "export",
    "interop.libraries": "as_timm",
    "interop.parity": "Parity",
    "interop.transformers.folders": "load_transformers",
    "reports.curve": "curve",
    "reports.html": "write_report",
    "reports.hub": "from_pretrained push_to_hub",
    "spec": "Spec",
    "supernet": "SuperNet",
    "tasks.convert": "compress convert",
    "tasks.finetune": "finetune",
    "tasks.lightning_callback": "SuperNetLightningCallback",
    "tasks.piad": "train_piad",
    "tasks.recover": "recover",
    "tasks.trainer_callback": "SuperNetTrainerCallback",
    "training.recipe": "Recipe",
}
_HOMES = {name: module for module, names in _NAMES.items() for name in names.split()}
__all__ = sorted(_HOMES)
_register_with_timm()


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'stratavit' has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(f"stratavit.{_HOMES[name]}"), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
