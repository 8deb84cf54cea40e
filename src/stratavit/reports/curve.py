"""Accuracy against size: measured along a ladder of budgets, and as a table."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from rich.table import Table
from torch import Tensor, nn

from stratavit.choices import ListAxes
from stratavit.dropout_list.strata import Strata
from stratavit.errors import StrataViTError
from stratavit.evaluation.accuracy import Metrics, evaluate
from stratavit.evaluation.curve_points import LADDER, LISTS, Point, by_list, parse_share
from stratavit.evaluation.features import knn, zero_shot
from stratavit.spec import Spec
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


def curve(
    net: SuperNet,
    loader: Iterable[Any],
    ladder: Sequence[str] = LADDER,
    judge: Judge = evaluate,
    axes: Sequence[ListAxes] = ("width", "both"),
) -> list[Point]:
    """Measures a super-network at a ladder of MACs budgets, largest first, on one list after the other.

    Args:
        net: With a dropout list.
        loader: Labelled images; run through once per budget.
        ladder: Shares such as ``"8/12"`` or ``"0.5"``; those below the reachable range are left out.
        judge: How accuracy is measured, see `judge_of`.
        axes: The lists to measure; ``both``, of widths and tokens, is left out where there is none.

    Returns:
        One point per budget and list: MACs and parameters as counts, top-1 and top-5 in percent, loss in nats.

    Raises:
        StrataViTError: There is no dropout list, or the images do not fit the model.
    """
    lists = lists_in(net)
    lowest = {name: net.macs(lists[name].smallest()) for name in axes if name in lists}
    asked = [(name, share) for name in lowest for share in ladder if parse_share(share) * net.macs() >= lowest[name]]
    points: list[Point] = []
    known: dict[Spec, Metrics] = {}
    with overall("accuracy at every size", sum(parse_share(share) for _, share in asked)) as begin:
        for name, share in asked:
            met = net.budget(macs=parse_share(share), axes=name)
            begin(parse_share(share))
            if (spec := net.resolve(met.spec)) not in known:  # the full model is on both lists
                known[spec] = judge(net, loader, spec, description=f"MACs {share}, {LISTS[name]}")
            size = {"share": met.got / net.macs(), "macs": met.got, "params": net.params(spec)}
            points.append(Point(share, **size, **known[spec].to_dict(), axes=name))  # type: ignore[arg-type]
    return points


def lists_in(net: SuperNet) -> dict[str, Strata]:
    """Axes -> dropout list, of those that a super-network has; the width list first.

    Raises:
        StrataViTError: It has none.
    """
    if net.strata is None:
        raise StrataViTError("no dropout list yet: call stratify(loader) first")
    return {"width": net.strata} | ({} if net.joint_strata is None else {"both": net.joint_strata})


def table(points: Sequence[Point]) -> Table:
    """The curve as a table for the terminal."""
    earlier = any(point.before is not None for point in points)
    rows = Table(title="accuracy against size")
    several = len(by_list(points)) > 1
    if several:
        rows.add_column("list", no_wrap=True)
    for heading in ("MACs asked", "MACs got", "share", "params", "top-1 %", "top-5 %", "loss"):
        rows.add_column(heading, justify="right")
    if earlier:
        rows.add_column("before %", justify="right")
    for p in points:
        cells = (human(p.macs), f"{p.share:.1%}", human(p.params), f"{p.top1:.2f}", f"{p.top5:.2f}", f"{p.loss:.3f}")
        first = [LISTS[p.axes]] if several else []
        rows.add_row(*first, p.asked, *cells, *([_percent(p.before)] if earlier else []))
    return rows


def _percent(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


def title_of(net: SuperNet) -> str:
    """What a picture of a super-network is called: its source and its method."""
    source = net.provenance.get("source")
    name = source.get("model") if isinstance(source, Mapping) else source
    return f"{name or net.description['architecture']}, {net.method} method"
