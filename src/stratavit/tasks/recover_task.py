"""Small models, or all sizes of a super-network, in recovery: they learn to do what their source does."""

from __future__ import annotations

import copy
import random
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from stratavit.artifacts import folder_format, sub_network
from stratavit.artifacts.timm_config import FILE as TIMM_FILE
from stratavit.elastic.learning import settle
from stratavit.errors import StrataViTError
from stratavit.evaluation import curve_points
from stratavit.evaluation.curve_points import parse_share
from stratavit.evaluation.output_agreement import OutputTally
from stratavit.models.cost import linear_macs
from stratavit.spec import Spec
from stratavit.tasks.sampling import draw, prefixes_of, rounded
from stratavit.training import distributed
from stratavit.training.imitation import Following, Imitation
from stratavit.training.recipe import Recipe
from stratavit.training.run_files import publish
from stratavit.training.task import SampledNetwork, TrainingTask
from stratavit.training.teacher import Teacher
from stratavit.training.unused_keys import RECOVERED
from stratavit.utils.model import classes_of, is_super_network, measured_at

LOOKS = 20  # times that a run measures the agreement with the teacher, at most
PATIENCE = 10  # looks without a better agreement, and not on the way to one, after which a run ends
SHARES = ("10/12", "8/12", "6/12")  # of the MACs: sizes of a super-network that are looked at, and the smallest one
BATCH = 64
FILES = (folder_format.WEIGHTS_FILE, folder_format.MOMENTS_FILE, TIMM_FILE, folder_format.JSON_FILE)


@dataclass
class Clock:
    """When a run began, when it looked at the agreement, and when it must end.

    Attributes:
        started: `time.perf_counter` at the beginning.
        limit: Seconds from then on; infinite for none.
        looks: Begin and end of every look, seconds from the beginning; of the first process.
    """

    started: float
    limit: float = float("inf")
    looks: list[tuple[float, float]] = field(default_factory=list)

    @property
    def late(self) -> bool:
        """Whether as long as from the look before last to the last one is no longer left."""
        if len(self.looks) < 2:
            return False
        now = self.looks[-1][1]
        return now + (now - self.looks[-2][1]) > self.limit


@dataclass
class HeldBack:
    """Images that nothing learns from, and what the teacher makes of them.

    Attributes:
        images: ``[n, C, H, W]``.
        teacher: Runs on them once.
    """

    images: Tensor
    teacher: Teacher
    outputs: list[Tensor] = field(default_factory=list)

    @torch.no_grad()
    def distance(self, net: Any, spec: Spec, device: torch.device) -> tuple[float, float]:
        """How a network at a spec agrees with the teacher.

        Returns:
            Percent of images with the same first class (of features: mean cosine, in percent); mean divergence, nats
            (of features: relative squared error).
        """
        parts = [part.to(device).float() for part in self.images.split(BATCH)]
        self.outputs = self.outputs or [self.teacher(part).float() for part in parts]
        found = OutputTally(classes_of(net.model))
        with measured_at(net, spec) as run:
            for part, theirs in zip(parts, self.outputs, strict=True):
                found.add(run(part), theirs)
        result = found.result()
        return result.agreement, result.distance


def stalled(curve: Sequence[float]) -> bool:
    """Whether a run is of no more use: for some looks none was the best, and they are not falling either.

    They may rise first and then fall below where they began, as the rate falls.
    """
    since = curve[curve.index(min(curve)) + 1 :]
    before, last = since[-PATIENCE : -PATIENCE // 2], since[-PATIENCE // 2 :]
    return len(since) >= PATIENCE and sum(last) >= sum(before)


class RecoverTask(TrainingTask):
    """A network in recovery; the weights that agreed best with the teacher are kept.

    Args:
        net: A `SuperNet`, whose weights and moments stay as they are and whose changes learn (`elastic.delta`), so that
            every size is trained as it is extracted; or `finetune.Plain`.
        lists: Sizes that learn, see `lists_of`.
        data_config: How its images are prepared.
        held: Images to measure the agreement on.
        clock: Of the run.
        recipe, steps, accelerator: See `TrainingTask`.

    Attributes:
        run_as: Each size of the lists -> itself, or the nearest of a few if passes are compiled (`compile_sizes`).
        curve: Mean divergence at every look; the first is before training.
        best: Weights at the lowest of these.
    """

    kind = RECOVERED

    def __init__(
        self,
        net: Any,
        lists: list[list[SampledNetwork]],
        data_config: Mapping[str, Any],
        held: HeldBack,
        clock: Clock,
        recipe: Recipe,
        steps: int,
        accelerator: Any,
    ) -> None:
        self.lists, self.data_config, self.held, self.clock = lists, data_config, held, clock
        count = recipe.compile_sizes
        run_as = [rounded(one, count, one[0].macs - one[-1].macs, complete=True) if count else one for one in lists]
        self.run_as = {one: other for pair in zip(lists, run_as, strict=True) for one, other in zip(*pair, strict=True)}
        full = net.macs() if is_super_network(net) else lists[0][0].macs
        super().__init__(net, full, recipe, steps, accelerator)
        held.teacher.to(accelerator.device, classes_of(net.model))
        self.curve: list[float] = []
        self.best: dict[str, Tensor] = {}
        self.before = self.facts()

    def target(self) -> Following:
        """The teacher's outputs, blocks and final tokens."""
        imitation = Imitation(self.data_config, self.recipe, classes_of(self.net.model))
        return Following(imitation, self.recipe.distil_blocks, tokens=1.0)

    def draw(self, generator: random.Random) -> list[SampledNetwork]:
        """The model as it is, or sizes of a super-network along one of its lists.

        A sandwich is without the largest of these, which is nearly the source: two passes.
        """
        drawn = draw(self.recipe.sampling, generator.choice(self.lists), generator)
        drawn = drawn[1:] or drawn if self.recipe.sampling == "sandwich" else drawn
        return list(dict.fromkeys(self.run_as[one] for one in drawn))

    @property
    def finished(self) -> bool:  # type: ignore[override]
        """Whether the agreement is not becoming better, or the time is up."""
        return stalled(self.curve) or self.clock.late

    def facts(self) -> dict[str, Any]:
        """Looks at the agreement with the teacher, and keeps the weights if it is the best so far.

        Returns:
            Percent and mean divergence, over some sizes of a super-network; then of each of these.
        """
        begun = time.perf_counter()
        sizes = looked_at(self.lists[0], self.full_macs)
        device = self.accelerator.device
        found = {share: self.held.distance(self.eval_net, one.spec, device) for share, one in sizes.items()}
        ended = time.perf_counter()
        found, look = distributed.broadcast((found, (begun - self.clock.started, ended - self.clock.started)))
        self.clock.looks.append(look)
        agreement, far = (sum(side) / len(found) for side in zip(*found.values(), strict=True))
        self.curve.append(far)
        if far == min(self.curve):
            self.best = copy.deepcopy(self.eval_net.model.state_dict())
        several = {f"agreement at {share}": pair[0] for share, pair in found.items()} if len(found) > 1 else {}
        return {"agreement": agreement, "divergence": far, **several}

    def verdict(self, rows: Iterable[Mapping[str, Any]]) -> list[str]:
        """A warning if no weights agreed better than those before."""
        if min(self.curve) < self.curve[0]:
            return []
        return ["nothing was learned: no weights agreed better with the teacher than those before; use a lower lr"]

    def evaluate(self, loader: Iterable[Any]) -> list[curve_points.Point]:
        """Nothing: there are no labels."""
        return []

    def graduate(self, facts: dict[str, Any]) -> None:
        """Gives `net` the weights that agreed best, in eval mode. `facts` go into its provenance."""
        model = self.net.model
        model.load_state_dict(self.best)
        if is_super_network(self.net):
            settle(self.net.elastic)  # what is saved is no longer in training
        facts = {**facts, "before": self.before, "divergence": min(self.curve)}
        owner = self.net if is_super_network(self.net) else model
        owner.provenance = {**getattr(owner, "provenance", {}), "recover": facts}
        self.net.eval()

    def publish(self, folder: Path, points: list[curve_points.Point]) -> None:
        """Writes the network into the run's folder."""
        whole = is_super_network(self.net)
        save = self.net.save if whole else partial(sub_network.save, self.net.model)
        publish(lambda path: save(path, overwrite=True), FILES, folder)

    def state(self) -> dict[str, Any]:
        """Weights, the best of them, and the curve."""
        return {**super().state(), "best": self.best, "curve": self.curve, "before": self.before}

    def restore(self, state: dict[str, Any]) -> None:
        """Goes back to what `state` returned; that of another model is refused."""
        super().restore(state)
        self.best, self.curve, self.before = state["best"], list(state["curve"]), state["before"]


def lists_of(net: Any, data_config: Mapping[str, Any], recipe: Recipe) -> list[list[SampledNetwork]]:
    """The sizes that learn: of a super-network those of its lists that drop at most `Recipe.reduction` of the MACs.

    Returns:
        Each list largest first, without the full size, which is the source. A batch draws from one of them.

    Raises:
        StrataViTError: It has no list, or none of its sizes is large enough.
    """
    if not is_super_network(net):
        return [[SampledNetwork(Spec({}), linear_macs(net.model, data_config["input_size"]))]]
    lists = [one for one in (net.strata, net.joint_strata) if one is not None]
    if not lists:
        raise StrataViTError("recover: this super-network has no dropout list; call stratify first, or extract a size")
    full = net.macs()
    every = [prefixes_of(one, net.cost, whole_groups=net.method == "paper")[1:] for one in lists]
    found = [[size for size in sizes if size.macs >= (1 - recipe.reduction) * full] for sizes in every]
    if not all(found):
        raise StrataViTError(f"recover: no size of this super-network drops less than {recipe.reduction:g} of the MACs")
    return found


def looked_at(sizes: list[SampledNetwork], full: int) -> dict[str, SampledNetwork]:
    """Share of the MACs -> the largest size within it, for the shares that are there; the smallest size."""
    if len(sizes) == 1:
        return {"1": sizes[0]}
    within = {share: [one for one in sizes if one.macs <= parse_share(share) * full + 0.5] for share in SHARES}
    return {**{share: some[0] for share, some in within.items() if some}, "smallest": sizes[-1]}
