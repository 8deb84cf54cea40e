"""`SuperNet`: the object users hold. It joins the parts; the work is done in theirs."""

from __future__ import annotations

import copy
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from stratavit import architecture, artifacts, contraction, sensitivity, strata
from stratavit.budget import Amount, Budget, meet
from stratavit.cost import cost_model
from stratavit.elastic import ElasticAttention, ElasticMlp, ElasticSite
from stratavit.errors import BudgetError, StrataViTError
from stratavit.extract import small_model
from stratavit.spec import Spec
from stratavit.statistics import Objective, collect
from stratavit.structure import find_sites, in_float32
from stratavit.wpac import CRITERIA, Criterion, scatter_needed

Method = Literal["default", "paper"]


class SuperNet(nn.Module):
    """A pre-trained ViT made elastic: one set of weights, every size a prefix of it.

    Args:
        model: A timm `VisionTransformer`; it is copied, never changed.
        data_config: Input size, mean, std, interpolation and crop as timm resolves them; read from the
            model if None.

    Attributes:
        model: The timm model, its attention and MLP modules elastic; its state dict is the stock one.
        sites: The modules that can be cut.
        strata: The dropout list, once `stratify` has run.
        method: ``paper``: cut channels count as zero and whole groups leave; ``default``: cut channels
            are replaced by their mean and units leave one by one.
        data_config: How input images must be prepared.
        provenance: Plain facts about how this super-network was made.

    Raises:
        UnsupportedModelError: A part of the model cannot be cut.
        StrataViTError: The weights hold NaN or infinite values.
    """

    def __init__(self, model: nn.Module, data_config: Mapping[str, Any] | None = None) -> None:
        super().__init__()
        self.sites = find_sites(model)
        assert isinstance(model, VisionTransformer)
        for name, parameter in model.named_parameters():
            if not parameter.detach().isfinite().all():
                raise StrataViTError(f"weights: {name} holds NaN or infinite values; give a sound checkpoint")
        self.description = architecture.describe(model)
        self.data_config = dict(data_config) if data_config is not None else architecture.resolve_data_config(model)
        self.model = copy.deepcopy(model)
        self.cost = cost_model(self.model, self.sites, self.data_config["input_size"])
        for site in self.sites:
            block, _, leaf = site.name.rpartition(".")
            layer = getattr(self.model.get_submodule(block), leaf)
            elastic = ElasticAttention(layer) if site.kind == "attention" else ElasticMlp(layer)
            setattr(self.model.get_submodule(block), leaf, elastic)
        self.strata: strata.Strata | None = None
        self.provenance: dict[str, Any] = {}
        self.method: Method = "default"
        self.train(model.training)

    @property
    def elastic(self) -> dict[str, ElasticSite]:
        """Site name -> elastic module."""
        return {site.name: self.model.get_submodule(site.name) for site in self.sites}

    @property
    def method(self) -> Method:
        """How cut channels are treated, see the class attributes."""
        return self._method

    @method.setter
    def method(self, method: Method) -> None:
        self._method: Method = _known(method)
        for site in self.elastic.values():
            site.compensation = "none" if method == "paper" else "mean"

    # ---- conversion -------------------------------------------------------------------------------

    def contract(
        self,
        loader: Iterable[Any],
        method: Method = "default",
        criterion: Criterion | None = None,
        objective: Objective = "auto",
        seed: int = 0,
    ) -> SuperNet:
        """WPAC: sorts the knowledge inside every module, in place, without changing the function.

        One forward and one backward pass over the calibration images (the paper uses 1,024).

        Args:
            loader: Yields images ``[B, 3, H, W]``, ``(images,)`` or ``(images, labels [B])``.
            method: ``paper`` is exactly the paper; ``default`` rotates the same and keeps the mean of what is cut.
            criterion: What channels are sorted by, ``wpac`` unless given; the others are baselines
                (``random``, ``magnitude``, ``taylor``, ``hessian``, ``pca``) and imply ``method="paper"``.
            objective: ``label``, ``cross_entropy``, ``prediction`` or ``auto``, see `statistics.collect`.
            seed: For ``random``.

        Returns:
            self.

        Raises:
            StrataViTError: Bad images, labels or options.
        """
        if criterion is not None and criterion not in CRITERIA:
            raise StrataViTError(f"criterion: expected one of {', '.join(CRITERIA)}, got {criterion!r}")
        method = _known(method) if criterion is None else "paper"
        criterion = criterion or "wpac"
        self.set_widths(None)
        with in_float32(self.model):
            statistics = collect(self.model, loader, objective, scatter_needed(criterion), "contract")
        contraction.apply(self.elastic, statistics, criterion, seed)
        self.strata, self.method = None, method
        self.provenance["contract"] = {
            "method": method,
            "criterion": criterion,
            "objective": objective,
            "images": next(iter(statistics.values())).images,
            "seed": seed,
        }
        return self

    def stratify(
        self,
        loader: Iterable[Any],
        method: Method | None = None,
        objective: Objective = "auto",
        measure: sensitivity.Measure = "auto",
    ) -> SuperNet:
        """Makes the one-shot dropout list, down to the smallest size, in place; no training.

        Unit importance as in the paper: sensitivity of the module times the Taylor importance of the
        unit's channels, per MAC, with tails merged (method section 2).

        Args:
            loader: The calibration images; it is run through several times.
            method: ``paper`` or ``default``; as set by `contract` if None.
            objective: For the Taylor importance, see `statistics.collect`.
            measure: Of sensitivity: ``top1``, ``cost`` or ``auto``, see `sensitivity.bypass_sensitivity`.

        Returns:
            self.

        Raises:
            StrataViTError: Bad images, labels or options.
        """
        method = self.method if method is None else _known(method)
        self.set_widths(None)
        with in_float32(self.model):
            statistics = collect(self.model, loader, objective, "none", "importance")
            gamma = sensitivity.bypass_sensitivity(self.model, self.sites, loader, measure)
        importance = {}
        for site in self.sites:
            alpha = statistics[site.name].taylor.sum(dim=0).mean(dim=0)  # [G, H, w] -> [w]
            importance[site.name] = strata.unit_importance(site, alpha.tolist(), gamma[site.name])
            if self.elastic[site.name].channel_mean.numel() == 0:
                contraction.set_mean(self.elastic[site.name], statistics[site.name].channel_mean)
        self.method = method
        self.strata = strata.Strata(self.sites, strata.removal_order(self.sites, importance, self.cost.tokens))
        self.provenance["stratify"] = {
            "method": method,
            "objective": objective,
            "measure": measure,
            "images": next(iter(statistics.values())).images,
            "sensitivity": gamma,
        }
        return self

    # ---- execution --------------------------------------------------------------------------------

    def forward(self, images: Tensor, spec: Mapping[str, int] | None = None) -> Tensor:
        """Runs the full model, or the prefix that a spec names; gradients reach the full weights.

        Args:
            images: ``[B, 3, H, W]``.
            spec: Widths; sites that are not named run at full width.

        Returns:
            Logits ``[B, classes]``.
        """
        self.set_widths(spec)
        logits: Tensor = self.model(images)
        return logits

    def set_widths(self, spec: Mapping[str, int] | None) -> None:
        """Sets the widths that the next pass through `model` runs at; None is full width."""
        widths = self.resolve(spec)
        for name, module in self.elastic.items():
            module.width = widths[name]

    def resolve(self, spec: Mapping[str, int] | None) -> Spec:
        """The width of every site under a spec.

        Raises:
            StrataViTError: The spec names an unknown site or a width above the full one.
        """
        full = {site.name: site.width for site in self.sites}
        for name, width in Spec(spec or {}).items():
            if name not in full:
                raise StrataViTError(f"spec: unknown site {name!r}; the sites are {', '.join(list(full)[:2])}, ...")
            if width > full[name]:
                raise StrataViTError(f"spec: {name} can keep at most {full[name]} channels, got {width}")
            full[name] = width
        return Spec(full)

    # ---- budgets ----------------------------------------------------------------------------------

    def macs(self, spec: Mapping[str, int] | None = None, attention: bool = False) -> int:
        """MACs per image, linear count; ``attention=True`` adds QK^T and AV. The dense model's without a spec."""
        return self.cost.macs(self.resolve(spec), attention)

    def params(self, spec: Mapping[str, int] | None = None) -> int:
        """Parameters of the extracted model. The dense model's without a spec."""
        biased = self.method != "paper"
        calibrated = all(module.channel_mean.numel() for module in self.elastic.values())
        return self.cost.params(self.resolve(spec), biased, corrected=biased and calibrated)

    def budget(
        self, *, macs: Amount | None = None, params: Amount | None = None, position: int | None = None
    ) -> Budget:
        """The largest sub-network of the dropout list within one budget, with asked, got and reachable range.

        Args:
            macs: A share in (0, 1] or ``"50%"`` of the dense model, or an absolute count (int, ``"2.1G"``).
            params: Likewise.
            position: Number of entries of the dropout list to drop; 0 is the full model.

        Raises:
            BudgetError: Not exactly one budget, unreadable, or outside the reachable range.
            StrataViTError: There is no dropout list yet.
        """
        if self.strata is None:
            raise StrataViTError("no dropout list yet: call stratify(loader) first, or give a spec")
        given = [
            kind for kind, value in (("macs", macs), ("params", params), ("position", position)) if value is not None
        ]
        if len(given) != 1:
            raise BudgetError(f"give exactly one of macs, params, position; got {' and '.join(given) or 'none'}")
        positions = range(len(self.strata) + 1) if self.method == "default" else self.strata.group_ends()
        if position is not None:
            if isinstance(position, bool) or not isinstance(position, int) or not 0 <= position <= len(self.strata):
                raise BudgetError(f"position: expected a whole number from 0 to {len(self.strata)}, got {position!r}")
            spec = self.strata.spec(position)
            low = self.macs(self.strata.spec(len(self.strata)))
            return Budget("macs", self.macs(spec), self.macs(spec), low, self.macs(), position, spec)
        if params is not None:
            return meet("params", params, self.params, self.strata.spec, positions)
        assert macs is not None
        return meet("macs", macs, self.macs, self.strata.spec, positions)

    def spec(self, *, macs: Amount | None = None, params: Amount | None = None, position: int | None = None) -> Spec:
        """The widths of the sub-network that `budget` finds."""
        return self.budget(macs=macs, params=params, position=position).spec

    def extract(
        self,
        *,
        macs: Amount | None = None,
        params: Amount | None = None,
        position: int | None = None,
        spec: Mapping[str, int] | None = None,
        verbose: bool = True,
    ) -> nn.Module:
        """A plain small model for a budget or a spec: stock timm layers, no dependence on this object.

        Args:
            macs, params, position: See `budget`.
            spec: Widths, in place of a budget.
            verbose: Print asked, got and reachable range to standard error.

        Raises:
            BudgetError, StrataViTError: See `budget` and `resolve`.
        """
        if spec is not None:
            if any(value is not None for value in (macs, params, position)):
                raise BudgetError("give either a spec or a budget, not both")
            widths = self.resolve(spec)
        else:
            met = self.budget(macs=macs, params=params, position=position)
            widths = met.spec
            if verbose:
                print(met, file=sys.stderr)
        small = small_model(self.model, self.sites, widths)
        small.provenance = {  # type: ignore[assignment]
            "super_network": self.provenance,
            "spec": dict(widths),
            "macs": self.macs(widths),
            "params": self.params(widths),
            "dense_macs": self.macs(),
            "dense_params": self.params(),
        }
        small.data_config = dict(self.data_config)  # type: ignore[assignment]
        return small

    # ---- files ------------------------------------------------------------------------------------

    def save(self, path: str | Path, overwrite: bool = False) -> None:
        """Writes a folder: ``model.safetensors`` (a timm checkpoint), ``moments.safetensors``, ``stratavit.json``.

        Raises:
            ArtifactError: The folder exists and is not empty (unless `overwrite`), or cannot be written.
        """
        artifacts.save_supernet(self, path, overwrite)

    @classmethod
    def load(cls, path: str | Path, device: torch.device | str = "cpu") -> SuperNet:
        """Reads what `save` wrote; runs no code from the files.

        Raises:
            ArtifactError: The folder is not a super-network's, or damaged.
        """
        return artifacts.load_supernet(cls, path, device)


def _known(method: Method) -> Method:
    if method not in ("default", "paper"):
        raise StrataViTError(f"method: expected 'default' or 'paper', got {method!r}")
    return method
