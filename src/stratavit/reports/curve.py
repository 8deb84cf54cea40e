"""Accuracy against size: measured along a ladder of budgets, and as a table."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from rich.table import Table
from torch import Tensor, nn

from stratavit.evaluation.accuracy import Metrics, evaluate
from stratavit.evaluation.curve_points import LADDER, Point, parse_share
from stratavit.evaluation.features import knn, zero_shot
from stratavit.utils.model import classes_of
from stratavit.utils.progress import overall
from stratavit.utils.text import human

if TYPE_CHECKING:
    from stratavit.supernet import SuperNet


class Judge(Protocol):
    """Measures a model, or a sub-network of one: `evaluate`, or see `judge_of`."""

    def __call__(
        self, model: nn.Module, loader: Iterable[Any], spec: Mapping[str, int] | None = None, description: str = ""
    ) -> Metrics:
        """Accuracy on labelled images."""


def judge_of(model: nn.Module, bank: Iterable[Any] | None = None, embeddings: Tensor | None = None) -> Judge:
    """How a model is measured: by text embeddings of the classes, by its head, or by neighbours in a labelled bank."""
    if embeddings is not None:
        return lambda model, loader, spec=None, description="zero-shot": zero_shot(
            model, embeddings, loader, spec, description=description
        )
    if classes_of(model) or bank is None:
        return evaluate
    return lambda model, loader, spec=None, description="nearest neighbours": knn(
        model, bank, loader, spec, description=description
    )


def curve(net: SuperNet, loader: Iterable[Any], ladder: Sequence[str] = LADDER, judge: Judge = evaluate) -> list[Point]:
    """Measures a super-network at a ladder of MACs budgets on its width list, largest first.

    Args:
        net: With a dropout list.
        loader: Labelled images; run through once per budget.
        ladder: Shares such as ``"8/12"`` or ``"0.5"``; those below the reachable range are left out.
        judge: How accuracy is measured, see `judge_of`.

    Returns:
        One point per budget: MACs and parameters as counts, top-1 and top-5 in percent, loss in nats.

    Raises:
        StrataViTError: There is no dropout list, or the images do not fit the model.
    """
    lowest = 0 if net.strata is None else net.macs(net.strata.smallest())
    shares = {asked: parse_share(asked) for asked in ladder if parse_share(asked) * net.macs() >= lowest}
    points: list[Point] = []
    with overall("accuracy at every size", sum(shares.values())) as begin:
        for asked, share in shares.items():
            met = net.budget(macs=share, axes="width")
            begin(share)
            metrics = judge(net, loader, met.spec, description=f"MACs {asked}")
            size = {"share": met.got / net.macs(), "macs": met.got, "params": net.params(met.spec)}
            points.append(Point(asked, **size, **metrics.to_dict()))  # type: ignore[arg-type]
    return points


def table(points: Sequence[Point], before: Sequence[Point] = ()) -> Table:
    """The curve as a table for the terminal, with the top-1 of a curve `before`, if there was one."""
    earlier = {point.asked: f"{point.top1:.2f}" for point in before}
    rows = Table(title="accuracy against size")
    for heading in ("MACs asked", "MACs got", "share", "params", "top-1 %", "top-5 %", "loss"):
        rows.add_column(heading, justify="right")
    if earlier:
        rows.add_column("before %", justify="right")
    for p in points:
        cells = (human(p.macs), f"{p.share:.1%}", human(p.params), f"{p.top1:.2f}", f"{p.top5:.2f}", f"{p.loss:.3f}")
        rows.add_row(p.asked, *cells, *([earlier.get(p.asked, "")] if earlier else []))
    return rows


def title_of(net: SuperNet) -> str:
    """What a picture of a super-network is called: its source and its method."""
    source = net.provenance.get("source")
    name = source.get("model") if isinstance(source, Mapping) else source
    return f"{name or net.description['architecture']}, {net.method} method"
