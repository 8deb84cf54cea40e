"""`SuperNet`: the object users hold. Its methods assemble; the work is done in the packages below."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from typing_extensions import Self, Unpack

from stratavit.artifacts import folder_format, super_network
from stratavit.budgets.amounts import Budget
from stratavit.budgets.constraints import BudgetArgs, find_spec, find_sub_network
from stratavit.budgets.merging_places import measured_number
from stratavit.budgets.prices import priced
from stratavit.calibration.contraction import TOKEN_WEIGHT, Method, known_method, resolve_method, sort_channels
from stratavit.calibration.dense_outputs import DenseOutputs, outputs_of
from stratavit.calibration.objectives import Measure, Objective
from stratavit.calibration.sums_place import SumsPlace
from stratavit.calibration.wpac import Criterion
from stratavit.choices import Units
from stratavit.data.pixels import Seen
from stratavit.dropout_list import build, floors, joint, strata
from stratavit.dropout_list.walk import Walk
from stratavit.elastic import network, token_places
from stratavit.elastic.base import ElasticSite
from stratavit.elastic.exchanged import Compensation, known_compensation
from stratavit.elastic.memory import Memory, memory_of, report_kept_moments, specialise
from stratavit.elastic.site import HEAD_DIM_UNIT, MLP_UNITS, UnitSizes, units_named, with_units
from stratavit.elastic.tokens import token_counts
from stratavit.evaluation.latency import Setting
from stratavit.interop.libraries import as_source, as_timm
from stratavit.models import changes, elastic_model, small_model, source_checks
from stratavit.models.cost import CostModel
from stratavit.models.final_mean import FinalMean
from stratavit.models.freezing import frozen_names
from stratavit.spec import Spec
from stratavit.utils.model import in_float32, model_device
from stratavit.utils.wrappers import unwrapped


class SuperNet(nn.Module):
    """A pre-trained ViT made elastic: one set of weights, every size a prefix of it.

    Args:
        model: A timm model of a supported family (`stratavit models`), or one of transformers, torchvision or
            open_clip (its image tower) that has an equivalent there; it is copied, never changed.
        data_config: Input size, mean, std, interpolation and crop as in timm, in place of the model's own.
        embedding: The head's output is a feature, as of a CLIP image tower; that of a model without a head always is.
        whole_heads: Plain attention loses whole heads, each as wide as ever, instead of coordinates of all heads; the
            width of such a site is a number of heads. Some GPUs gain more from these, accuracy falls faster.

    Attributes:
        model: The timm model, its attention and MLP modules elastic; its state dict is the stock one.
        sites: The modules that can be cut, in `units` (see `set_units`).
        uncut: Name -> reason of attention and MLP modules that cannot be cut and stay as they are.
        strata: The dropout list, once `stratify` has run; `joint_strata` that over both axes, widths and tokens.
        final_mean: Shift of the mean of what the head reads, by size; ``full`` compensation puts it back. None is off.
        data_config: How input images must be prepared.
        provenance: Plain facts about how this super-network was made.

    Raises:
        UnsupportedModelError: It cannot be cut, or computes what is in neither weights nor arguments (an image tells).
        StrataViTError: The weights hold NaN or infinite values, or `data_config` has an unknown key.
    """

    super_network = True  # see `utils.model.is_super_network`

    # ---- build -------------------------------------------------------------------------------------

    def __init__(
        self,
        model: nn.Module,
        data_config: Mapping[str, Any] | None = None,
        embedding: bool | None = None,
        *,
        whole_heads: bool = False,
        _description: Mapping[str, Any] | None = None,  # of a model just built from it, so nothing else is in it
    ) -> None:
        super().__init__()
        source = as_timm(given := unwrapped(model))  # which has compared what it made
        made = elastic_model.elastic_model(
            source, data_config, embedding, _description, compare=source is given, whole_heads=whole_heads
        )
        self.model, self.sites, self.uncut = made.model, made.sites, made.uncut
        self.description, self.data_config = made.description, made.data_config
        self._cost, self._form, self._shift = made.cost, made.form, made.shift
        self.embedding = self.model.embedding
        self.units: UnitSizes = (HEAD_DIM_UNIT, MLP_UNITS)
        self.origin: dict[str, Any] | None = getattr(self.model, "origin", None)
        self._dense_outputs: DenseOutputs | None = None  # for the images of `contract`; `stratify` uses them
        self._seen: Seen | None = None  # the images of `contract`, if it kept moments of folds
        self.strata: strata.Strata | None = None
        self.joint_strata: strata.Strata | None = None
        self.final_mean: FinalMean | None = None
        self.provenance: dict[str, Any] = {}
        self.frozen, self.frozen_for_serving = frozen_names(self.model), False
        self.method: Method = "default"
        self.register_load_state_dict_post_hook(report_kept_moments)
        self.train(source.training)

    @property
    def elastic(self) -> dict[str, ElasticSite]:
        """Site name -> elastic module; a `StrataViTError` if one was taken out of the model or replaced."""
        return {site.name: network.site_of(self.model, site.name) for site in self.sites}

    @property
    def method(self) -> Method:
        """``paper``: cut channels count as zero, groups are dropped together; ``default``: they are predicted."""
        return self._method

    @method.setter
    def method(self, method: Method) -> None:
        self._method: Method = known_method(method)
        self.compensation = "none" if method == "paper" else "full"

    @property
    def compensation(self) -> Compensation:
        """In place of cut channels: ``full``, their prediction from the kept ones; ``mean``; or ``none``."""
        return next(iter(self.elastic.values())).compensation

    @compensation.setter
    def compensation(self, compensation: Compensation) -> None:
        for site in self.elastic.values():
            site.compensation = known_compensation(compensation)

    def set_units(
        self, head_dim_unit: int = HEAD_DIM_UNIT, mlp_units: int = MLP_UNITS, *, units: Units | None = None
    ) -> None:
        """Sets the units that a dropout list cuts sites in; a list made in others is dropped.

        Args:
            head_dim_unit: Coordinates of the head width that are dropped together (paper: 8).
            mlp_units: Groups that the MLP hidden width is cut into (paper: 32).
            units: In place of both: ``default``, or ``gpu``, see `stratify`.

        Raises:
            StrataViTError: A number is not a whole number of at least 1, or an unknown name.
        """
        sizes = (head_dim_unit, mlp_units) if units is None else units_named(units)
        sites = with_units(self.sites, sizes)
        if sizes != self.units:
            self.units, self.sites = sizes, sites
            self._cost = replace(self.cost, sites=self.sites)
            self.strata = self.joint_strata = self.final_mean = None

    # ---- run ---------------------------------------------------------------------------------------

    def forward(self, images: Tensor, spec: Mapping[str, int] | None = None) -> Tensor:
        """Runs the full model, or the prefix that a spec names; gradients reach the full weights.

        Args:
            images: ``[B, 3, H, W]``.
            spec: Widths; sites that are not named run at full width.

        Returns:
            Logits ``[B, classes]``.
        """
        with self.at(spec) as model:
            return model(images)

    @contextmanager
    def at(self, spec: Mapping[str, int] | None = None, fixed: bool = False) -> Iterator[nn.Module]:
        """Runs `model` at a spec inside, in this thread or asyncio task alone; outside it runs at full width.

        Args:
            spec: Widths; sites that are not named run at full width.
            fixed: Promises that no weight changes and none needs a gradient; compensation is then computed once.

        Yields:
            `model`.

        Raises:
            StrataViTError: The spec does not fit, or gradient checkpointing would recompute blocks at full width.
        """
        widths = self.resolve(spec)
        if torch.is_grad_enabled() and not fixed and widths != self.resolve(None):
            source_checks.check_not_recomputed(self.model)
        shift, tokens = small_model.final_shift(self, widths), token_counts(self.model, self._cost.places, widths)
        with network.run_at(self.elastic, widths, fixed, {self._shift: shift}, tokens):
            yield self.model

    def source_copy(self) -> nn.Module:
        """A copy of the full model as it is, to teach by.

        Returns:
            A timm model in eval mode, its weights frozen.
        """
        return source_checks.whole_copy(self.model).requires_grad_(False).eval()

    # ---- convert -----------------------------------------------------------------------------------

    def contract(
        self,
        loader: Iterable[Any],
        method: Method | None = None,
        criterion: Criterion | None = None,
        objective: Objective = "auto",
        seed: int = 0,
        token_weight: float = TOKEN_WEIGHT,
        memory: SumsPlace = "auto",
    ) -> Self:
        """Sorts the knowledge inside every module, in place, without changing the function, in one pass over images.

        Args:
            loader: Calibration images ``[B, 3, H, W]`` in any order (the paper uses 1,024), alone, with labels
                ``[B]``, or in mappings, see `batches.unpack`.
            method: ``default`` gathers what `compensation` needs; ``paper``. That of the criterion if None.
            criterion: What channels are sorted by: ``output`` (default method: what each module adds to the residual
                stream), ``wpac`` (paper), or a baseline: ``random``, ``magnitude``, ``taylor``, ``hessian``, ``pca``.
            objective: What is differentiated, see `statistics.collect`; ``auto`` suits the method and the labels.
            seed: For ``random`` and for the objective ``sampled``.
            token_weight: ``default``: share of a token's weight that follows the gradient norm at the module's output.
            memory: ``default``: sum covariances on the ``device``, or batch by batch on the ``host`` (CPU), which then
                keeps the moments until they are used. ``auto``: on the host if half of the free memory is too little.

        Returns:
            self.

        Raises:
            StrataViTError: Bad images, labels or options.
        """
        method, criterion = resolve_method(method, criterion)
        with in_float32(self.model), self.at():
            facts, known = sort_channels(self.model, loader, criterion, objective, seed, token_weight, memory)
        if known is not None:
            known.seal(self.model)  # contraction keeps the function
        self._dense_outputs, self._seen = known, None if known is None else known.seen
        self.strata = self.joint_strata = self.final_mean = None
        self.method, self.frozen_for_serving = method, False
        self.provenance["contract"] = {"method": method, **facts}
        return self

    def stratify(
        self,
        loader: Iterable[Any],
        method: Method | None = None,
        objective: Objective = "auto",
        measure: Measure = "auto",
        plan: Walk | None = None,
        seed: int = 0,
        price: Literal["macs", "latency"] = "macs",
        setting: Setting | None = None,
        axes: Sequence[str] = ("width",),
        ignore: Sequence[str] | None = None,
        min_width: floors.MinWidth | None = None,
        units: Units | None = None,
        merging_places: int | None = None,
    ) -> Self:
        """Makes the one-shot dropout list, down to the smallest size, in place; no training.

        Args:
            loader: The calibration images, several times over. Best those of `contract` pixel by pixel (no random
                augmentation): each is then measured with moments that do not contain it. Others are reported.
            method: ``default`` measures what one more unit brings to cut networks (`walk`); ``paper`` ranks units by
                module sensitivity times Taylor importance, per MAC. As set by `contract` if None.
            objective, seed: ``paper``: for the Taylor importance, see `statistics.collect`.
            measure: ``paper``: of sensitivity, ``top1``, ``cost`` or ``auto``, see `sensitivity.bypass_sensitivity`.
            plan: ``default``: sizes, steps and numbers of images; `Walk()` if None.
            price, setting: Importance of widths is divided by MACs (paper) or by ``latency`` in a setting (one image).
            axes: ``("width", "tokens")`` makes a second list (`joint_strata`) that also merges tokens.
            ignore: Patterns (``blocks.0.*``) of sites that no list cuts, nor one that grows in training.
            min_width: Least width of a site, or by pattern: channels (int) or a share. Both None: as set before.
            units: ``default`` (see `set_units`); ``gpu``: head widths in multiples of 32, hidden ones of 64 or 128.
                None: as set before, but ``gpu`` for default units if latency is the price and weights are on a GPU.
            merging_places: Number of blocks that merge tokens. None: five of twelve, in proportion; if latency is the
                price, as many of these as measured time allows (`budgets.merging_places`).

        Returns:
            self.

        Raises:
            StrataViTError: Bad images, labels or options.
        """
        method = self.method if method is None else known_method(method)
        sizes = build.units_for(self.units, units, price, model_device(self.model))
        own = floors.with_floors(replace(self.cost, sites=with_units(self.sites, sizes)), ignore, min_width)
        tokens = joint.token_search(axes, method, self.model, own.places, merging_places)
        if tokens is not None and tokens.places is None and price == "latency":
            number = measured_number(self.model, own, setting or Setting(), self.data_config["input_size"])
            tokens = replace(tokens, places=number)
        cost = priced(own, self.elastic, price, setting)
        options: Any = {"objective": objective, "measure": measure, "plan": plan, "seed": seed, "tokens": tokens}
        options |= {"known": outputs_of(self.model, self._dense_outputs), "seen": self._seen}
        with in_float32(self.model), self.at():
            made = build.make_list(self.model, cost, loader, method, **options)
        if method != self.method:
            self.method = method
        self.units, self.sites, self._cost, self._dense_outputs = sizes, own.sites, own, None
        self.strata, self.joint_strata, self.final_mean, facts = made
        self.provenance["stratify"] = {"method": method, "price": price, "prices": cost.prices, **facts}
        return self

    # ---- cost --------------------------------------------------------------------------------------

    @property
    def cost(self) -> CostModel:
        """What its sizes cost, as the model is now; a `StrataViTError` if a change of it cannot be followed."""
        if changes.form_of(self.model) != self._form:
            self.description, self.data_config, self._cost, self._form = changes.follow(self)
        return self._cost

    def resolve(self, spec: Mapping[str, int] | None) -> Spec:
        """The width of every site under a spec; a `StrataViTError` for an unknown site or a width above the full one.

        Args:
            spec: Widths; sites that are not named are at full width. None is the dense model.

        Returns:
            A spec that names every site.
        """
        asked = spec if isinstance(spec, Spec) else Spec(spec)
        places = (self.cost if token_places.drops_patches(asked) else self._cost).places  # does pooling read them now?
        return token_places.resolve(self.sites, places, asked)

    def macs(self, spec: Mapping[str, int] | None = None, attention: bool = False) -> int:
        """Multiply-accumulates (MACs) per image.

        Args:
            spec: Widths, see `resolve`.
            attention: Add the products QK^T and AV to the linear count.

        Returns:
            Number of MACs.
        """
        return self.cost.macs(self.resolve(spec), attention)

    def params(self, spec: Mapping[str, int] | None = None) -> int:
        """Parameters of the extracted model.

        Args:
            spec: Widths, see `resolve`.

        Returns:
            Number of parameters.
        """
        return small_model.params_at(self, self.resolve(spec))

    def memory(self) -> Memory:
        """What the network holds in memory.

        Returns:
            Bytes of weights, means, second moments and specialised weights.
        """
        return memory_of(self)

    # ---- cut ---------------------------------------------------------------------------------------

    def extract(
        self, *, spec: Mapping[str, int] | None = None, verbose: bool = True, **asked: Unpack[BudgetArgs]
    ) -> nn.Module:
        """A plain small model of the class that the source had: stock layers, no dependence on this object.

        Args:
            spec: Widths, in place of a budget.
            verbose: Print asked, got and reachable range to standard error.
            **asked: Budgets, see `budget`.

        Returns:
            A module in eval mode, in the setting's dtype; images ``[B, C, H, W]`` to logits ``[B, classes]``.

        Raises:
            BudgetError, StrataViTError: See `budget` and `resolve`; or layers or hooks were put into `model` since.
        """
        widths = find_spec(self, spec, verbose, asked)
        return as_source(small_model.small_at(self, widths, getattr(asked.get("setting"), "dtype", None)))

    def spec(self, **asked: Unpack[BudgetArgs]) -> Spec:
        """The widths of the sub-network that `budget` finds.

        Args:
            **asked: Budgets, see `budget`.

        Returns:
            Width of every site.
        """
        return self.budget(**asked).spec

    def budget(self, **asked: Unpack[BudgetArgs]) -> Budget:
        """The largest sub-network of the list that keeps all costs, or the smallest that keeps an accuracy, too.

        Args:
            macs, params: A share in (0, 1] or ``"50%"`` of the dense model, or an absolute count (int, ``"2.1G"``).
            memory_mb: Megabytes (10**6 bytes) of the weights in the setting's dtype, or ``"50%"``.
            latency_ms: Median milliseconds per batch in the setting on the weights' device, or ``"50%"``; timed.
            top1, max_drop: Percent of the images in `data` that must be right; points of it that may be lost.
            position: Number of entries of the dropout list to drop; 0 is the full model. Alone only.
            axes: ``width``; ``both``: merge tokens, too; ``auto``: both if it can, but for params, memory and position.
            data: Labelled images for `top1` and `max_drop`, run through about ten times.
            setting: For `memory_mb` and `latency_ms`; one image, eager, the model's dtype if left out.

        Returns:
            The spec, and of every budget what was asked, what was got and the reachable range.

        Raises:
            BudgetError: No budget, an unreadable one, one that cannot be reached, or budgets that exclude each other.
            StrataViTError: There is no dropout list yet.
        """
        return find_sub_network(self, asked)

    def small_at(self, widths: Mapping[str, int]) -> nn.Module:
        """The plain small model of a spec in timm's form, see `extract`, also for errors.

        Args:
            widths: A spec.

        Returns:
            A timm model in eval mode.
        """
        return small_model.small_at(self, self.resolve(widths))

    # ---- keep --------------------------------------------------------------------------------------

    def specialise(self, *specs: Mapping[str, int], moments: bool = False) -> Memory:
        """Keeps the compensated weights of several sizes ready for ``net(images, spec)``; the rest of a size is a view.

        Args:
            *specs: The sizes to serve.
            moments: Keep the second moments. Else the network is frozen, and other sizes are compensated by the mean.

        Returns:
            What the network holds in memory.
        """
        specialise(self.elastic, [self.resolve(spec) for spec in specs], moments)
        if not moments:
            self.frozen_for_serving = True
            self.requires_grad_(False)
        return self.memory()

    def forget_moments(self) -> None:
        """Drops second moments and all that was computed from them, as training makes them stale."""
        self.frozen_for_serving = False
        for module in self.elastic.values():
            module.forget()

    def save(self, path: str | Path, overwrite: bool = False, moments: bool = True) -> None:
        """Writes a folder: ``model.safetensors`` (a timm checkpoint), ``moments.safetensors``, ``stratavit.json``.

        Args:
            path: Folder to write.
            overwrite: Replace a folder that is not empty.
            moments: Keep second moments and final mean (about two thirds of the weights' size), or compensate by means.

        Raises:
            ArtifactError: The folder exists and is not empty (unless `overwrite`), or cannot be written.
        """
        super_network.write(path, self, overwrite, moments)

    @classmethod
    def load(cls, path: str | Path, device: torch.device | str = "cpu", moments: bool = True) -> SuperNet:
        """Reads what `save` wrote; runs no code from the files.

        Args:
            path: The folder.
            device: Of the weights.
            moments: Read second moments, too; without them it is little larger than the model, see `save`.

        Returns:
            The super-network, in eval mode on the device.

        Raises:
            ArtifactError: The folder is not a super-network's, or damaged.
        """
        model, content = folder_format.read_saved(path, folder_format.SUPER, device)
        net = cls(model, content["data_config"], _description=content["model"])
        super_network.restore(net, path, content, moments)
        return net
