"""A super-network in training: its raw and averaged weights, its growing list, and what is measured of it."""

from __future__ import annotations

import random
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from stratavit.artifacts.folder_format import JSON_FILE, MOMENTS_FILE, WEIGHTS_FILE
from stratavit.artifacts.timm_config import FILE as TIMM_FILE
from stratavit.calibration import contraction
from stratavit.calibration.contraction import TOKEN_WEIGHT
from stratavit.calibration.moments import moments_of
from stratavit.calibration.objectives import Objective
from stratavit.calibration.statistics import collect
from stratavit.choices import ListAxes
from stratavit.dropout_list.strata import Entry, Strata
from stratavit.elastic.compensation import Moments
from stratavit.elastic.token_places import SiteOrPlace
from stratavit.errors import StrataViTError
from stratavit.evaluation import curve_points
from stratavit.reports import curve, plots
from stratavit.tasks import progressive_list
from stratavit.tasks.fixed_places import FixedPlaces
from stratavit.tasks.sampling import draw, prefixes_of, random_widths, rounded, without_layers
from stratavit.training import distributed
from stratavit.training.recipe import Recipe
from stratavit.training.run_files import LOG_FILE, Journal, publish
from stratavit.training.task import SampledNetwork, TrainingTask

if TYPE_CHECKING:
    from stratavit.supernet import SuperNet


CURVE_FILE, PLOT_FILE, HISTORY_FILE = "curve.csv", "curve.png", "history.png"
SUPER_FILES = (WEIGHTS_FILE, MOMENTS_FILE, TIMM_FILE, CURVE_FILE, PLOT_FILE, HISTORY_FILE, JSON_FILE)


class PiadTask(TrainingTask):
    """A super-network in training.

    Args:
        net: It loses what training makes stale: moments and the final mean.
        proxy: Images that importance and means are measured on.
        recipe, steps, accelerator: See `TrainingTask`.

    Attributes:
        kind: The method, so that a state of one is not resumed with the other.
        listed: The sites, and the places that merge tokens if the recipe goes by the list over both axes.
        given: The list that the network came with, if the recipe goes by it; else empty.
        entries: The dropout list so far.
        places: Where compiled graphs find means and moments.
        prefixes: Its prefixes; with `Recipe.compile_sizes` each is rounded to one of these sizes.
    """

    net: SuperNet
    proxy: Iterable[Any]

    def __init__(self, net: SuperNet, proxy: Iterable[Any], recipe: Recipe, steps: int, accelerator: Any) -> None:
        self.kind, self.proxy = net.method, proxy
        _drop_stale(net, recipe)
        net.set_units(recipe.head_dim_unit, recipe.mlp_units)
        self.listed: tuple[SiteOrPlace, ...] = (*net.sites, *net.cost.places) if recipe.axes == "both" else net.sites
        self.given = _given_list(net, recipe)
        super().__init__(net, net.macs(), recipe, steps, accelerator)
        self.places = FixedPlaces()
        self.set_list([])

    @property
    def strata(self) -> Strata:
        """The list so far."""
        return Strata(self.listed, self.entries)

    def facts(self) -> dict[str, Any]:
        """Length of the list, and the share of the dense MACs that its smallest network costs, for the log."""
        return {"entries": len(self.entries), "smallest": self.net.macs(self.strata.smallest()) / self.full_macs}

    def set_list(self, entries: list[Entry]) -> None:
        """Sets the list, to the first process's where there are several."""
        rows = distributed.broadcast(Strata(self.listed, entries).to_json())
        self.entries = [Entry(*row) for row in rows]
        self.prefixes = prefixes_of(self.strata, self.net.cost, whole_groups=self.net.method == "paper")
        if self.recipe.compile_sizes:
            dropped = self.recipe.reduction * self.net.macs()
            self.prefixes = rounded(self.prefixes, self.recipe.compile_sizes, dropped, self.complete)

    @property
    def complete(self) -> bool:
        """Whether there is nothing that the list could still cut."""
        if self.recipe.axes == "both":
            return len(self.entries) == len(self.given)
        smallest = self.strata.smallest()
        return all(smallest[site.name] <= site.least for site in self.net.sites)

    def begin_stage(self, stage: int) -> None:
        """Measures means and importance on the raw weights as they are, and lets the list grow."""
        if self.recipe.mode == "plain":
            return
        self.refresh_means(self.net)
        if self.recipe.mode != "channel":
            self.set_list(self.grown(self.net, self.entries, stage))

    def grown(self, net: SuperNet, entries: list[Entry], stage: int) -> list[Entry]:
        """The list for a stage: on along the given one, and measured at `net` where that does not suffice."""
        recipe = self.recipe
        stages = recipe.stages if recipe.mode == "piad" else 1
        growth = progressive_list.Growth(recipe.reduction, stages, recipe.objective, recipe.measure)
        target = growth.target(self.full_macs, stage)
        entries = progressive_list.extend(entries, self.given[len(entries) :], net.cost, target)
        if recipe.axes == "both":
            return entries
        return progressive_list.grow(net, self.proxy, entries, stage, growth)

    def draw(self, generator: random.Random) -> list[SampledNetwork]:
        """Sub-networks that one batch runs, as the recipe's mode has it."""
        mode, sites = self.recipe.mode, self.net.sites
        if mode == "plain":
            specs = [self.net.resolve(None)]
        elif mode == "channel":
            specs = [random_widths(sites, generator)]
        else:
            found = draw(self.recipe.sampling, self.prefixes, generator)
            if mode == "piad":
                return found
            rate = self.recipe.layer_drop if mode == "layerdrop" else 0.0
            specs = [without_layers(one.spec, sites, rate, generator) for one in found]
        return [SampledNetwork(spec, self.net.macs(spec)) for spec in specs]

    def refresh_means(self, net: SuperNet) -> None:
        """Measures what replaces cut channels: the mean of every channel, and moments if they serve."""
        if net.compensation == "none":
            return
        full = net.compensation == "full"
        objective: Objective = "auto" if full else self.recipe.objective
        with net.at():
            statistics = collect(net.model, self.proxy, objective, "none", "means", TOKEN_WEIGHT if full else None)
        for name, module in net.elastic.items():
            mean = statistics[name].channel_mean
            if full:
                mean, moments = moments_of(module, statistics[name])
                scalars = distributed.broadcast((moments.ridge, moments.energy))
                module.moments = Moments(distributed.broadcast_tensor(moments.factor), *scalars)
            contraction.set_mean(module, distributed.broadcast_tensor(mean.to(module.out.weight)))
        if self.recipe.compile_sizes and net is self.net:
            self.places.put(net.elastic)

    def settle(self) -> SuperNet:
        """Gives the evaluated network its list and its own means; ``plain`` and ``channel`` make their list here."""
        net: SuperNet = self.eval_net
        self.refresh_means(net)
        if self.recipe.mode in ("plain", "channel"):
            self.set_list(self.grown(net, [], 0))
        self._give_lists(net)
        return net

    def _give_lists(self, net: SuperNet) -> None:
        """Gives a network the list; one that does not grow stays as it came, and the width list with it."""
        if self.recipe.axes == "both":
            net.strata, net.joint_strata = self.net.strata, Strata(self.listed, self.given)
        else:
            net.strata, net.joint_strata = self.strata, None  # measured on other weights

    def evaluate(self, loader: Iterable[Any]) -> list[curve_points.Point]:
        """The ladder of budgets on the list that is trained, see `ladder`."""
        return ladder(self.settle(), self.proxy, self.recipe.axes, self.accelerator, loader)

    def graduate(self, facts: dict[str, Any]) -> None:
        """Gives `net` the weights to keep, their means and the list; eval mode. `facts` go into its provenance."""
        kept, net = self.settle(), self.net
        if kept is not net:
            net.model.load_state_dict(kept.model.state_dict())
            for name, module in net.elastic.items():
                contraction.set_mean(module, kept.elastic[name].channel_mean)
                module.moments = kept.elastic[name].moments
        self._give_lists(net)
        self.places.release(net.elastic)
        net.eval()
        net.provenance.pop("stratify", None)
        net.provenance["train"] = facts

    def publish(self, folder: Path, points: list[curve_points.Point]) -> None:
        """Writes the super-network into the run's folder, and the curve of the last evaluation if there was one."""

        def write(path: Path) -> None:
            self.net.save(path, overwrite=True)
            if points:
                title = f"{self.net.description['architecture']}, {self.recipe.mode}"
                curve_points.write_csv(points, path / CURVE_FILE)
                plots.plot(points, path / PLOT_FILE, title)
                plots.plot_history(evaluations(folder), path / HISTORY_FILE, title)

        publish(write, SUPER_FILES, folder)

    def state(self) -> dict[str, Any]:
        """Weights, averaged weights, means, moments and list."""
        modules = self.net.elastic
        return {
            **self.lists(),
            **super().state(),
            "means": {name: module.channel_mean for name, module in modules.items()},
            "moments": {name: None if m.moments is None else vars(m.moments) for name, m in modules.items()},
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Goes back to what `state` returned; that of another model is refused."""
        super().restore(state)
        for name, module in self.net.elastic.items():
            contraction.set_mean(module, state["means"][name])
            moments = state["moments"][name]
            module.moments = None if moments is None else Moments(**moments).to(module.out.weight.device)
        if self.recipe.compile_sizes:
            self.places.put(self.net.elastic)
        self.restore_lists(state)

    def lists(self) -> dict[str, Any]:
        """The list so far, and the one that it goes by: the part of the state that JSON can hold."""
        return {"strata": self.strata.to_json(), "given": Strata(self.listed, self.given).to_json()}

    def restore_lists(self, state: Mapping[str, Any]) -> None:
        """Goes back to the lists that `lists` returned."""
        self.given = list(Strata.from_json(self.listed, state["given"]).entries)
        self.set_list(list(Strata.from_json(self.listed, state["strata"]).entries))


def ladder(
    net: SuperNet, bank: Iterable[Any], axes: ListAxes, accelerator: Any, loader: Iterable[Any]
) -> list[curve_points.Point]:
    """The ladder of budgets, largest first, its rungs shared out among the processes."""
    rungs = curve_points.LADDER[accelerator.process_index :: accelerator.num_processes]
    points = distributed.gather(curve.curve(net, loader, rungs, curve.judge_of(net, bank=bank), (axes,)))
    return sorted(points, key=lambda point: -point.macs)


def measure_before(
    net: SuperNet, proxy: Iterable[Any], axes: ListAxes, accelerator: Any, loader: Iterable[Any]
) -> list[curve_points.Point]:
    """The ladder of the network as it came, with all that training will drop; without a list its full size alone."""
    net.float().to(accelerator.device)
    own = net.strata
    net.strata = own or Strata(net.sites, [])
    try:
        return ladder(net, proxy, axes, accelerator, loader)
    finally:
        net.strata = own


def evaluations(folder: Path) -> list[tuple[int, list[curve_points.Point]]]:
    """The ladders of budgets that a run has logged, with the epochs after which they were measured."""
    return [(epoch, points) for epoch, points in curve_points.curves(Journal(folder / LOG_FILE).rows()) if points]


def _drop_stale(net: SuperNet, recipe: Recipe) -> None:
    """Drops what training makes stale, and sets what replaces cut channels."""
    if net.method == "paper" and recipe.compensation == "full":
        raise StrataViTError("train: compensation 'full' needs a network contracted by the default method, not 'paper'")
    if not any(parameter.requires_grad for parameter in net.parameters()):
        raise StrataViTError("train: all weights are frozen (as specialise() does); call requires_grad_(True) first")
    net.final_mean = net._dense_outputs = None
    net.forget_moments()
    wanted: Literal["mean", "full"] = "mean" if recipe.compensation == "mean" else "full"
    net.compensation = "none" if net.method == "paper" else wanted


def _given_list(net: SuperNet, recipe: Recipe) -> list[Entry]:
    """The list that a network came with in the recipe's units, if the recipe goes by it."""
    if recipe.axes == "both":
        if net.joint_strata is None or recipe.mode != "piad" or recipe.list_source == "progressive":
            raise StrataViTError(
                "train: axes 'both' needs list_source 'given', mode 'piad' and a network with a list over widths and "
                "tokens (convert --axes both) in the recipe's units"
            )
        return list(net.joint_strata.entries)
    auto = recipe.list_source == "auto"
    if recipe.list_source == "progressive" or (auto and (net.strata is None or net.method == "paper")):
        return []
    if net.strata is None:
        raise StrataViTError(
            "train: list_source 'given' needs a network with a dropout list in units of "
            f"{recipe.head_dim_unit} (head_dim_unit) and 1/{recipe.mlp_units} (mlp_units); call stratify first"
        )
    return list(net.strata.entries)
