"""Does every family of models keep the contract? Small random models of the tests, a row for each family.

    python benchmarks/families.py [--in-place] [--only FAMILY] [--resume]

The models are all of tests/architectures.py, or with `--in-place` the classes of transformers in tests/hosted_models.py
that `convert_part` cuts: a new one is in the next table.
Each is contracted and given a list on noise, then checked: the function that contraction keeps, the extracted model
against the elastic network at 2/3 and 1/2 of the MACs, costs, files, and the ONNX file. What fails is written where its
figure would be.
Each model is a line of the journal, from which ``--resume`` goes on. With ``--only`` tables are printed, not written.
"""

from __future__ import annotations

import argparse
import math
import sys
import tempfile
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import onnxruntime
import torch
from common import Journal, apart, write_results
from hosts import FirstOutput
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

import architectures
import hosted_models
from helpers import PLAN, relative_error

import stratavit
from stratavit import BudgetError, Spec, SuperNet
from stratavit.hosts.converting import host_outputs
from stratavit.interop.timm_equivalent import tensor_of
from stratavit.models.cost import linear_macs
from stratavit.models.families import family_of
from stratavit.models.families.hosted import HostedPart

SHARES = (2 / 3, 1 / 2)  # of the MACs
CALIBRATION, IMAGES = 12, 3  # images of noise
BOUNDS = {"contraction": 2e-5, "extracted": 1e-5, "costs": 0.0, "files": 0.0, "ONNX": 1e-4}
PREFIX = "in place: "
IN_PLACE = tuple(f"{PREFIX}{name}" for name in hosted_models.CLASSES)
COUNTS = ("costs", "files")  # figures that must be zero
NOTE = (
    f"Small models of random weights (tests/architectures.py), contracted on {CALIBRATION} images of noise and "
    f"compared on {IMAGES} others. The worst model of a family is in brackets. Errors: largest difference over the "
    "largest output. contraction: the super-network at full width against the source. extracted: small models at 2/3 "
    "and 1/2 of the MACs, or the smallest of the list where that is larger, against the super-network at these widths. "
    "costs: largest difference of MACs (with and without attention's products) or parameters from those counted on the "
    "small model. files: the small model and the super-network, saved and loaded: the same bits, else the largest "
    "difference; of models that are cut in place only the small model has one. ONNX: the small model at 1/2, run by "
    "ONNX Runtime; of models that are cut in place written by torch.onnx.export alone, with dynamo=False where its "
    "usual exporter fails. smallest: the smallest share of MACs on the list. kept: models all of whose "
    f"figures are within {', '.join(f'{bound:g} ({name})' for name, bound in BOUNDS.items())}."
)


def main() -> None:
    """Checks models, and prints or writes both tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--in-place", action="store_true", help="classes of transformers that convert_part cuts")
    parser.add_argument("--only", metavar="FAMILY", help="as the table has it, such as 'Swin-V2'")
    parser.add_argument("--resume", action="store_true", help="go on from the journal")
    parser.add_argument("--journal", type=Path, default=Path(__file__).parent / "work" / "families.jsonl")
    args = parser.parse_args()
    families = {name: family_title(name) for name in (IN_PLACE if args.in_place else names())}
    if args.only not in (None, *families.values()):
        parser.error(f"--only: expected one of {', '.join(sorted(set(families.values())))}; got {args.only!r}")
    if not args.resume:
        args.journal.unlink(missing_ok=True)
    exported_error(nn.Linear(2, 2), {"input": torch.ones(1, 2)})  # what exporters import, before the processes part
    journal, rows = Journal(args.journal, "model"), []
    for name, family in families.items():
        if args.only in (None, family):
            if {"model": name} not in journal:
                journal.add({"family": family, "model": name, **in_own_process(name)})
            rows.append(journal.rows[name,])
    rows.sort(key=lambda row: list(families.values()).index(row["family"]))
    if args.only is None:
        table = "families-in-place" if args.in_place else "families"
        write_results(f"{table}-models", [{key: shown(key, row[key]) for key in row} for row in rows], NOTE)
        write_results(table, by_family(rows), NOTE)
    else:
        print(*rows, *by_family(rows), sep="\n")


def names() -> tuple[str, ...]:
    """The models that become timm's and are put under the contract by the tests."""
    return (*architectures.ALL, *architectures.WHOLE)


def family_title(name: str) -> str:
    """Title of a model's family; models of other libraries are families of their own, as their files differ."""
    if name == architectures.TORCHVISION:
        return "torchvision"
    if name in IN_PLACE:
        return name.removeprefix(PREFIX).partition(",")[0]
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
        case = (CaseInPlace if name in IN_PLACE else Case)(name.removeprefix(PREFIX))
    except Exception as error:
        return {"smallest": "", **dict.fromkeys(BOUNDS, f"not converted: {reason(error)}")}
    net = case.net
    lowest = net.macs(net.strata.spec(len(net.strata))) / net.macs()
    parts = (case.contraction, case.extraction, case.costs, case.files, case.onnx)
    return {"smallest": f"{lowest:.1%}", **dict(zip(BOUNDS, map(figure, parts), strict=True))}


def figure(part: Callable[[], float]) -> float | str:
    """What a check finds; if it fails, the reason."""
    try:
        with torch.no_grad():
            found = part()
    except Exception as error:  # reported in the table, whatever it is
        return reason(error)
    return found if math.isfinite(found) else f"{found}"


def reason(error: BaseException) -> str:
    """Kind and first line of the error that is behind an error."""
    while error.__cause__ is not None:
        error = error.__cause__
    return f"{type(error).__name__}: {error}".splitlines()[0][:200]


class Case:
    """A model with its super-network; each method is a part of the contract, and returns its worst figure.

    Args:
        name: In tests/architectures.py.
    """

    def __init__(self, name: str) -> None:
        side, self.source = architectures.side(name), architectures.make(name)
        images = torch.randn(CALIBRATION, 3, side, side)
        loader = [(half, torch.arange(len(half))) for half in images.split(CALIBRATION // 2)]
        self.net = SuperNet(self.source).contract(loader).stratify(loader, plan=PLAN).eval()
        self.sizes = [size(self.net, share) for share in SHARES]
        self.images = torch.randn(IMAGES, 3, side, side)

    def small(self, spec: Spec) -> Any:
        """The extracted model."""
        return self.net.extract(spec=spec, verbose=False).eval()

    def output(self, model: nn.Module, *spec: Spec) -> Tensor:
        """Of a model of any library."""
        return tensor_of(model(self.images, *spec))

    def contraction(self) -> float:
        """Error of the super-network at full width against the source."""
        return relative_error(self.output(self.net), self.output(self.source))

    def extraction(self) -> float:
        """Error of small models against the super-network."""
        return max(relative_error(self.output(self.small(one)), self.output(self.net, one)) for one in self.sizes)

    def costs(self) -> float:
        """Difference of MACs or parameters from those that are counted."""
        differences = []
        for spec in self.sizes:
            small = stratavit.as_timm(self.small(spec))
            for attention in (False, True):
                counted = linear_macs(small, self.net.data_config["input_size"], attention=attention)
                differences.append(abs(self.net.macs(spec, attention=attention) - counted))
            differences.append(abs(self.net.params(spec) - parameters(small)))
        return float(max(differences))

    def files(self) -> float:
        """Difference after small model and super-network were saved and loaded."""
        small = self.small(self.sizes[-1])
        with tempfile.TemporaryDirectory() as folder:
            stratavit.save(small, f"{folder}/small")
            self.net.save(f"{folder}/net")
            back, net = stratavit.load(f"{folder}/small").eval(), SuperNet.load(f"{folder}/net").eval()
            pairs = [(self.output(back), self.output(small))]
            pairs += [(self.output(net, one), self.output(self.net, one)) for one in self.sizes]
        return max(float((found - expected).abs().max()) for found, expected in pairs)

    def onnx(self) -> float:
        """Error of the exported small model."""
        with tempfile.TemporaryDirectory() as folder:
            file = f"{folder}/small.onnx"
            parity = stratavit.export(self.small(self.sizes[-1]), file, images=self.images, tolerance=math.inf)
        return parity.difference / parity.largest


class CaseInPlace(Case):
    """A model of transformers that is cut in place, by `convert_part`. It has no file of its super-network.

    Args:
        name: Among the classes of tests/hosted_models.py.
    """

    def __init__(self, name: str) -> None:
        hosted = hosted_models.CLASSES[name]
        self.source = hosted_models.make(hosted)
        batches = hosted_models.batches_for(hosted, 3, CALIBRATION // 2)
        self.net = stratavit.convert_part(self.source, "", batches[1:], plan=PLAN)
        self.sizes = [size(self.net, share) for share in SHARES]
        self.batch = {key: value[:IMAGES] for key, value in batches[0].items()}

    def output(self, model: nn.Module, *spec: Spec) -> Tensor:
        """What the model returns first; of a super-network, at a spec."""
        if model is self.net:
            with self.net.at(*spec or ({},)) as elastic:
                return self.output(elastic.part)
        return host_outputs(model, self.batch, lambda host, batch: host(**batch))[0]

    def costs(self) -> float:
        """Difference of MACs or parameters from those that are counted."""
        part, image, differences = self.net.model, self.net.sample[:1], []
        how = (part.images, part.unsqueezed, part.arguments, part.by_image, part.outputs)
        for spec in self.sizes:
            small = self.small(spec)
            counted = linear_macs(HostedPart("small", small, *how), tuple(image.shape[1:]), image=image)
            differences += [abs(self.net.macs(spec) - counted), abs(self.net.params(spec) - parameters(small))]
        return float(max(differences))

    def files(self) -> float:
        """Difference after the small model was saved and loaded."""
        small = self.small(self.sizes[-1])
        with tempfile.TemporaryDirectory() as folder:
            small.save_pretrained(folder)
            back = stratavit.load_transformers(folder)
        return float((self.output(back) - self.output(small)).abs().max())

    def onnx(self) -> float:
        """Error of the small model, exported by torch alone."""
        return exported_error(self.small(self.sizes[-1]), self.batch)


def size(net: Any, share: float) -> Spec:
    """Widths at a share of the MACs; the smallest of the list where the share is out of reach."""
    try:
        return net.spec(macs=share)
    except BudgetError:
        return net.spec(position=len(net.strata))


def exported_error(model: nn.Module, batch: Mapping[str, Tensor]) -> float:
    """Error of a model's first output as an ONNX file that torch writes, if need be by its older exporter."""
    function, inputs = FirstOutput(model, list(batch)).eval(), tuple(batch.values())
    with tempfile.TemporaryDirectory() as folder:
        file, how = f"{folder}/small.onnx", {"verbose": False, "input_names": list(batch)}
        try:
            torch.onnx.export(function, inputs, file, dynamo=True, **how)
        except Exception:  # it meets functions that it does not know
            torch.onnx.export(function, inputs, file, dynamo=False, **how)
        session = onnxruntime.InferenceSession(file)
    given = {one.name: batch[one.name].numpy() for one in session.get_inputs()}  # some become constants
    return relative_error(torch.from_numpy(session.run(None, given)[0]), function(*inputs).detach())


def parameters(model: nn.Module) -> int:
    """Number of them."""
    return sum(parameter.numel() for parameter in model.parameters())


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
