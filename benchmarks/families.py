"""Does every family of models keep the contract? Small random models of the tests, one row for each family.

    python benchmarks/families.py [--only FAMILY] [--resume]

The models are those of tests/architectures.py, all of them, so that a new one is in the next table. Each is contracted
and given a list on noise, then checked: the function that contraction keeps, the extracted model against the elastic
network at 2/3 and 1/2 of the MACs, costs, files, and the ONNX file. What fails is written where its figure would be.
Each model is a line of the journal, from which ``--resume`` goes on. With ``--only`` tables are printed, not written.
"""

from __future__ import annotations

import argparse
import math
import sys
import tempfile
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import onnxruntime  # noqa: F401  before the processes part
import onnxscript  # noqa: F401
import torch
from common import Journal, apart, write_results
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

import architectures
from helpers import PLAN, relative_error

import stratavit
from stratavit import BudgetError, Spec, SuperNet
from stratavit.interop.timm_equivalent import tensor_of
from stratavit.models.cost import linear_macs
from stratavit.models.families import family_of

SHARES = {"2/3": 2 / 3, "1/2": 1 / 2}  # of the MACs
CALIBRATION, IMAGES = 12, 3  # images of noise
BOUNDS = {"contraction": 2e-5, "extracted": 1e-5, "costs": 0.0, "files": 0.0, "ONNX": 1e-4}
COUNTS = ("costs", "files")  # figures that must be zero
NOTE = (
    f"Small models of random weights (tests/architectures.py), contracted on {CALIBRATION} images of noise and "
    f"compared on {IMAGES} others. The worst model of a family is in brackets. Errors: largest difference over the "
    "largest output. contraction: the super-network at full width against the source. extracted: small models at 2/3 "
    "and 1/2 of the MACs, or the smallest of the list where that is larger, against the super-network at these widths. "
    "costs: largest difference of MACs (with and without attention's products) or parameters from those counted on the "
    "small model. files: the small model and the super-network, saved and loaded: the same bits, else the largest "
    "difference. ONNX: the small model at 1/2, run by ONNX Runtime. smallest: of the list. kept: models all of whose "
    f"figures are within {', '.join(f'{bound:g} ({name})' for name, bound in BOUNDS.items())}."
)


class Case(NamedTuple):
    """A converted model at some sizes, and what to compare it on."""

    source: nn.Module
    net: SuperNet
    sizes: tuple[Spec, ...]
    images: Tensor  # [B, 3, H, W]

    def small(self, spec: Spec) -> Any:
        """The extracted model."""
        return self.net.extract(spec=spec, verbose=False).eval()


def main() -> None:
    """Checks models, and prints or writes both tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", metavar="FAMILY", help="as the table has it, such as 'Swin-V2'")
    parser.add_argument("--resume", action="store_true", help="go on from the journal")
    parser.add_argument("--journal", type=Path, default=Path(__file__).parent / "work" / "families.jsonl")
    args = parser.parse_args()
    families = {name: family_title(name) for name in names()}
    if args.only not in (None, *families.values()):
        parser.error(f"--only: expected one of {', '.join(sorted(set(families.values())))}; got {args.only!r}")
    if not args.resume:
        args.journal.unlink(missing_ok=True)
    journal, rows = Journal(args.journal, "model"), []
    for name, family in families.items():
        if args.only in (None, family):
            if {"model": name} not in journal:
                journal.add({"family": family, "model": name, **in_own_process(name)})
            rows.append(journal.rows[name,])
    rows.sort(key=lambda row: list(families.values()).index(row["family"]))
    if args.only is None:
        write_results("families-models", [{key: shown(key, value) for key, value in row.items()} for row in rows], NOTE)
        write_results("families", by_family(rows), NOTE)
    else:
        print(*rows, *by_family(rows), sep="\n")


def names() -> tuple[str, ...]:
    """All models that the tests put under the contract."""
    return (*architectures.ALL, *architectures.WHOLE)


def family_title(name: str) -> str:
    """Title of a model's family; models of other libraries are families of their own, as their files differ."""
    if name == architectures.TORCHVISION:
        return "torchvision"
    if name.partition(",")[0] in architectures.TRANSFORMERS:
        return "transformers"
    return family_of(architectures.make(name)).title


def in_own_process(name: str) -> dict[str, Any]:
    """What `checked` says, also where the process does not survive it."""
    try:
        found: dict[str, Any] = apart(checked, name)
    except Exception as error:
        found = {"smallest": "", **dict.fromkeys(BOUNDS, f"process ended: {reason(error)}")}
    return found


def checked(name: str) -> dict[str, Any]:
    """The figure of every part of the contract, or the reason why there is none, as plain data."""
    warnings.simplefilter("ignore")
    torch.manual_seed(0)
    try:
        case, smallest = converted(name)
    except Exception as error:
        return {"smallest": "", **dict.fromkeys(BOUNDS, f"not converted: {reason(error)}")}
    parts = (contraction_error, extraction_error, cost_difference, file_difference, onnx_error)
    return {"smallest": smallest, **dict(zip(BOUNDS, (figure(part, case) for part in parts), strict=True))}


def figure(part: Callable[[Case], float], case: Case) -> float | str:
    """What a check finds; if it fails, the reason."""
    try:
        with torch.no_grad():
            found = part(case)
    except Exception as error:  # reported in the table, whatever it is
        return reason(error)
    return found if math.isfinite(found) else f"{found}"


def reason(error: Exception) -> str:
    """Kind and first line of an error."""
    return f"{type(error).__name__}: {error}".splitlines()[0][:300]


def converted(name: str) -> tuple[Case, str]:
    """A model's super-network with a list, its sizes, and its smallest share of the MACs."""
    side, source = architectures.side(name), architectures.make(name)
    images = torch.randn(CALIBRATION, 3, side, side)
    loader = [(half, torch.arange(len(half))) for half in images.split(CALIBRATION // 2)]
    net = SuperNet(source).contract(loader).stratify(loader, plan=PLAN).eval()
    sizes = tuple(size(net, share) for share in SHARES.values())
    lowest = net.macs(net.strata.spec(len(net.strata))) / net.macs()
    return Case(source, net, sizes, torch.randn(IMAGES, 3, side, side)), f"{lowest:.1%}"


def size(net: SuperNet, share: float) -> Spec:
    """Widths at a share of the MACs; the smallest of the list where the share is out of reach."""
    try:
        return net.spec(macs=share)
    except BudgetError:
        return net.spec(position=len(net.strata))


def output(model: nn.Module, case: Case, *spec: Spec) -> Tensor:
    """Of a model of any library."""
    return tensor_of(model(case.images, *spec))


def contraction_error(case: Case) -> float:
    """Of the super-network at full width against the source."""
    return relative_error(output(case.net, case), output(case.source, case))


def extraction_error(case: Case) -> float:
    """Of small models against the super-network, the largest."""
    return max(relative_error(output(case.small(one), case), output(case.net, case, one)) for one in case.sizes)


def cost_difference(case: Case) -> float:
    """Largest difference of MACs or parameters, as said and as counted."""
    differences = []
    for spec in case.sizes:
        small = stratavit.as_timm(case.small(spec))
        for attention in (False, True):
            counted = linear_macs(small, case.net.data_config["input_size"], attention=attention)
            differences.append(abs(case.net.macs(spec, attention=attention) - counted))
        differences.append(abs(case.net.params(spec) - sum(one.numel() for one in small.parameters())))
    return float(max(differences))


def file_difference(case: Case) -> float:
    """Largest difference after small model and super-network were saved and loaded."""
    spec, found = case.sizes[-1], []
    small = case.small(spec)
    with tempfile.TemporaryDirectory() as folder:
        stratavit.save(small, f"{folder}/small")
        case.net.save(f"{folder}/net")
        back, net = stratavit.load(f"{folder}/small").eval(), SuperNet.load(f"{folder}/net").eval()
        found.append(output(back, case) - output(small, case))
        found += [output(net, case, one) - output(case.net, case, one) for one in case.sizes]
    return max(float(one.abs().max()) for one in found)


def onnx_error(case: Case) -> float:
    """Of the exported small model, run by ONNX Runtime."""
    with tempfile.TemporaryDirectory() as folder:
        file = f"{folder}/small.onnx"
        parity = stratavit.export(case.small(case.sizes[-1]), file, images=case.images, tolerance=math.inf)
    return parity.difference / parity.largest


def by_family(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The worst figure of every family, with the model that has it."""
    table = []
    for family in dict.fromkeys(row["family"] for row in rows):
        models = [row for row in rows if row["family"] == family]
        table.append({"family": family, "models": len(models)} | {part: worst(part, models) for part in BOUNDS})
        table[-1]["smallest"] = max((row["smallest"] for row in models), key=lambda text: float(text.rstrip("%") or 0))
        table[-1]["kept"] = f"{sum(all(fits(part, row[part]) for part in BOUNDS) for row in models)} of {len(models)}"
    return table


def worst(part: str, models: Sequence[dict[str, Any]]) -> str:
    """The failures if there are any, the first with its reason, else the largest figure."""
    failed = [row for row in models if isinstance(row[part], str)]
    row = failed[0] if failed else max(models, key=lambda row: row[part])
    named = len(models) > 1 and not (part in COUNTS and row[part] == 0)
    where = ", ".join(row["model"] for row in failed) or row["model"]
    return shown(part, row[part]) + (f" ({where})" if named else "")


def shown(part: str, value: Any) -> Any:
    """A cell of either table."""
    if part in COUNTS and value == 0:
        return "exact" if part == "costs" else "equal"
    return f"{value:.1e}" if isinstance(value, float) else str(value).replace("|", "/")


def fits(part: str, value: float | str) -> bool:
    """Whether a figure is within its bound; a reason is not."""
    return not isinstance(value, str) and value <= BOUNDS[part]


if __name__ == "__main__":
    main()
