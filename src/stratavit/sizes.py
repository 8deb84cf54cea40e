"""What sizes a super-network has: widths of a spec, their cost, and budgets met along the dropout list."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from operator import index
from typing import Any, Literal, SupportsIndex

from torch import Tensor, nn
from typing_extensions import Unpack

from stratavit.budget import Bound, Budget
from stratavit.cost import CostModel
from stratavit.elastic import Compensation, ElasticSite
from stratavit.errors import BudgetError, StrataViTError, described
from stratavit.final_mean import FinalMean
from stratavit.limits import Asked, given, limits_of
from stratavit.search import meet
from stratavit.site import HEAD_DIM_UNIT, MLP_UNITS, Site, with_units
from stratavit.spec import Spec
from stratavit.strata import Strata

Method = Literal["default", "paper"]


class Sized(nn.Module):
    """The sizes of a super-network; `SuperNet` gives it what it rests on."""

    super_network = True  # see `structure.is_super_network`
    sites: tuple[Site, ...]
    units: tuple[int, int]
    cost: CostModel
    strata: Strata | None
    final_mean: FinalMean | None
    data_config: dict[str, Any]
    released: bool  # second moments were there and are not any more, see `specialise`

    @property
    def elastic(self) -> dict[str, ElasticSite]:
        """Site name -> elastic module."""
        raise NotImplementedError

    @property
    def method(self) -> Method:
        """How cut channels are treated, see the class attributes."""
        return self._method

    @method.setter
    def method(self, method: Method) -> None:
        self._method: Method = known_method(method)
        self.compensation = "none" if method == "paper" else "full"

    @property
    def compensation(self) -> Compensation:
        """What takes the place of cut channels."""
        return next(iter(self.elastic.values())).compensation

    @compensation.setter
    def compensation(self, compensation: Compensation) -> None:
        if compensation not in ("none", "mean", "full"):
            raise StrataViTError(f"compensation: expected 'none', 'mean' or 'full', got {described(compensation)}")
        for site in self.elastic.values():
            site.compensation = compensation

    def set_units(self, head_dim_unit: int = HEAD_DIM_UNIT, mlp_units: int = MLP_UNITS) -> None:
        """Sets the units that a dropout list cuts sites in; a list made in others is dropped.

        Args:
            head_dim_unit: Coordinates of the head width that leave together (paper: 8).
            mlp_units: Groups that the MLP hidden width is cut into (paper: 32).
        """
        for name, value in (("head_dim_unit", head_dim_unit), ("mlp_units", mlp_units)):
            if type(value) is not int or value < 1:
                raise StrataViTError(f"{name}: expected a whole number of at least 1, got {value!r}")
        if (head_dim_unit, mlp_units) == self.units:
            return
        self.units = head_dim_unit, mlp_units
        self.sites = with_units(self.sites, head_dim_unit, mlp_units)
        self.cost = replace(self.cost, sites=self.sites)
        self.strata = self.final_mean = None

    def resolve(self, spec: Mapping[str, int] | None) -> Spec:
        """The width of every site under a spec.

        Raises:
            StrataViTError: The spec names an unknown site or a width above the full one.
        """
        full = {site.name: site.width for site in self.sites}
        asked = spec if isinstance(spec, Spec) else Spec(spec or {})
        for name, width in asked.items():
            if name not in full:
                raise StrataViTError(
                    f"spec: unknown site {described(name)}; the sites are {', '.join(list(full)[:2])}, ..."
                )
            if width > full[name]:
                raise StrataViTError(f"spec: {name} can keep at most {full[name]} channels, got {described(width)}")
            full[name] = width
        for name, width in asked.qk.items():
            whole = next(site.qk_width for site in self.sites if site.name == name)
            needed = whole if whole and full[name] else full[name]
            if width != needed:
                why = f"stays whole, {whole}" if whole else "is as wide as v"
                raise StrataViTError(f"spec: qk of {name} {why}; asked qk {described(width)} with v {full[name]}")
        return Spec(full)

    def macs(self, spec: Mapping[str, int] | None = None, attention: bool = False) -> int:
        """MACs per image, linear count; ``attention=True`` adds QK^T and AV. The dense model's without a spec."""
        return self.cost.macs(self.resolve(spec), attention)

    def params(self, spec: Mapping[str, int] | None = None) -> int:
        """Parameters of the extracted model. The dense model's without a spec."""
        biased = self.compensation != "none"
        calibrated = all(module.channel_mean.numel() for module in self.elastic.values())
        return self.cost.params(self.resolve(spec), biased, corrected=biased and calibrated)

    def specialise(self, *specs: Mapping[str, int], moments: bool = False) -> Memory:
        """Makes ready to serve several sizes from this one set of weights: ``net(images, spec)`` in inference mode.

        What compensation makes of `proj` and `fc2` at the widths of each spec is computed once and kept; the rest of
        every size is a view of the full weights.

        Args:
            *specs: The sizes to serve.
            moments: Keep the second moments. Without them the network is frozen, needs little more than its weights,
                and sizes that were not named are compensated by the mean only.

        Returns:
            What the network holds in memory.

        Raises:
            StrataViTError: A spec does not fit.
        """
        for spec in [self.resolve(spec) for spec in specs]:
            for name, module in self.elastic.items():
                module.specialise(spec[name])
        if not moments:
            for module in self.elastic.values():
                module.moments, module.crossed = None, ()
            self.released = True
            self.requires_grad_(False)
        return self.memory()

    def forget_moments(self) -> None:
        """Drops second moments and all that was computed from them, as training makes them stale."""
        self.released = False
        for module in self.elastic.values():
            module.moments, module.crossed = None, ()
            module.forget_last()

    def memory(self) -> Memory:
        """What the network holds in memory, by kind."""
        modules = self.elastic.values()
        known = [one for module in modules if (one := module.moments) is not None]
        known += [moments for module in modules for _, moments in module.crossed]
        means = [module.channel_mean for module in modules]
        means += [mean for module in modules for mean, _ in module.crossed]
        means += [] if self.final_mean is None else [self.final_mean.vectors]
        return Memory(
            weights=size_of(self.state_dict().values()),
            means=size_of(means),
            moments=size_of(one.factor for one in known),
            corrected=size_of(t for m in modules for one in m.corrected.values() for t in one.pair),
        )

    def small_at(self, widths: Mapping[str, int]) -> nn.Module:
        """The plain small model of a spec."""
        raise NotImplementedError

    def budget(self, **asked: Unpack[Asked]) -> Budget:
        """The sub-network of the dropout list that keeps one budget or several, with asked, got and reachable range.

        The largest that keeps all costs; with `top1` or `max_drop` the smallest that keeps those, too.

        Args:
            macs: A share in (0, 1] or ``"50%"`` of the dense model, or an absolute count (int, ``"2.1G"``).
            params: Likewise.
            memory_mb: Megabytes (10**6 bytes) of the weights in the setting's dtype, or ``"50%"``.
            latency_ms: Median milliseconds per batch in the setting, on the device that the weights are on, or
                ``"50%"``. Timed: at about ten sizes, and once more at the one that is returned. As accurate as the
                machine is quiet.
            top1: Percent of the images in `data` that must be right.
            max_drop: Points of top-1 on `data` that may be lost.
            position: Number of entries of the dropout list to drop; 0 is the full model. Alone only.
            data: Labelled images, run through about ten times, for `top1` and `max_drop`.
            setting: `Setting` for `memory_mb` and `latency_ms`; one image, eager, the model's dtype if left out.

        Raises:
            BudgetError: No budget, an unreadable one, one outside the reachable range, or budgets that exclude
                each other.
            StrataViTError: There is no dropout list yet.
        """
        if self.strata is None:
            raise StrataViTError("no dropout list yet: call stratify(loader) first, or give a spec")
        amounts = given(asked)
        positions = range(len(self.strata) + 1) if self.method == "default" else self.strata.group_ends()
        if "position" in amounts:
            return self._at(amounts["position"])
        found = limits_of(self, amounts, asked.get("data"), asked.get("setting"))
        return meet(found, self.strata.spec, positions)

    def _at(self, position: Any) -> Budget:
        assert self.strata is not None
        whole = isinstance(position, SupportsIndex) and not isinstance(position, bool)
        if not whole or not 0 <= (position := index(position)) <= len(self.strata):
            raise BudgetError(f"position: expected a whole number from 0 to {len(self.strata)}, got {position!r}")
        spec = self.strata.spec(position)
        low = self.macs(self.strata.smallest())
        return Budget((Bound("macs", self.macs(spec), self.macs(spec), low, self.macs()),), position, spec)

    def spec(self, **asked: Unpack[Asked]) -> Spec:
        """The widths of the sub-network that `budget` finds."""
        return self.budget(**asked).spec


@dataclass(frozen=True)
class Memory:
    """Bytes that a super-network holds.

    Attributes:
        weights: Of the full model; every size is a part of them.
        means: Means of channels, and the final mean.
        moments: Second moments, which serve any spec.
        corrected: `proj` and `fc2` of the specialised specs.
    """

    weights: int
    means: int
    moments: int
    corrected: int

    @property
    def total(self) -> int:
        """All together."""
        return self.weights + self.means + self.moments + self.corrected

    def __str__(self) -> str:
        parts = {"weights": self.weights, "means": self.means, "moments": self.moments, "corrected": self.corrected}
        text = ", ".join(f"{name} {size / 1e6:.2f}" for name, size in parts.items())
        return f"{self.total / 1e6:.2f} MB: {text}; {self.total / self.weights:.3f} x the full model"


def size_of(tensors: Iterable[Tensor]) -> int:
    """Bytes of tensors."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def known_method(method: Method) -> Method:
    """The method, if it is one.

    Raises:
        StrataViTError: It is not.
    """
    if method not in ("default", "paper"):
        raise StrataViTError(f"method: expected 'default' or 'paper', got {described(method)}")
    return method
