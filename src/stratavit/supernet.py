"""`SuperNet`: the object users hold. Its methods assemble; the work is done in the packages below."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from typing_extensions import Self, Unpack

from stratavit.artifacts import folder_format
from stratavit.artifacts import moments as moments_file
from stratavit.budgets.amounts import Budget
from stratavit.budgets.constraints import BudgetArgs, find_sub_network
from stratavit.budgets.latency_cost import priced
from stratavit.calibration.contraction import TOKEN_WEIGHT, Method, known_method, resolve_method, sort_channels
from stratavit.calibration.dense_outputs import DenseOutputs
from stratavit.calibration.objectives import Measure, Objective
from stratavit.calibration.wpac import Criterion
from stratavit.data.pixels import Seen
from stratavit.dropout_list import build, strata
from stratavit.dropout_list.walk import Walk
from stratavit.elastic.base import Compensation, ElasticSite, run_at, site_of
from stratavit.elastic.memory import Memory, memory_of
from stratavit.elastic.running import Run, running
from stratavit.elastic.site import HEAD_DIM_UNIT, MLP_UNITS, with_units
from stratavit.elastic.widths import full_spec
from stratavit.errors import ArtifactError, BudgetError, StrataViTError, UnsupportedModelError, described
from stratavit.evaluation.latency import Setting
from stratavit.interop.convert import as_source, as_timm
from stratavit.models import architecture, changes, source_checks
from stratavit.models.cost import CostModel, cost_model
from stratavit.models.equality import Subject, check_equal
from stratavit.models.extraction import small_model
from stratavit.models.families import elastic_sites, find_sites, last_norm, stages
from stratavit.models.final_mean import FinalMean, Shift
from stratavit.models.freezing import frozen_names, set_frozen
from stratavit.spec import Spec
from stratavit.utils.classifier import with_plain_head
from stratavit.utils.model import in_float32
from stratavit.utils.wrappers import unwrapped


class SuperNet(nn.Module):
    """A pre-trained ViT made elastic: one set of weights, every size a prefix of it.

    Args:
        model: A timm model of a supported family (`stratavit models`), or one of transformers or torchvision that has
            an equivalent there; it is copied, never changed.
        data_config: Input size, mean, std, interpolation and crop as timm resolves them; what is not given is read
            from the model.
        embedding: The head does not tell classes apart but leads into an embedding, as that of a CLIP image tower: the
            answer is taken for a feature. A model without a head (``num_classes=0``) always answers with features.

    Attributes:
        model: The timm model, its attention and MLP modules elastic; its state dict is the stock one.
        sites: The modules that can be cut.
        uncut: Name -> reason of attention and MLP modules that cannot be cut and stay as they are.
        units: What a dropout list cuts them in, see `set_units`.
        strata: The dropout list, once `stratify` has run.
        method: ``paper``: cut channels count as zero and whole groups leave; ``default``: cut channels
            are replaced by what the kept ones predict and units leave one by one.
        compensation: ``full`` (default method): what cut channels did is predicted from the kept ones, in closed form;
            ``mean``: only their mean is kept; ``none`` (paper).
        final_mean: By how much the mean of what the head reads moves as the model shrinks along the list; put back
            where compensation is ``full``, for any spec by its share of the MACs. None switches it off.
        data_config: How input images must be prepared.
        provenance: Plain facts about how this super-network was made.

    Raises:
        UnsupportedModelError: A part of the model cannot be cut, or it computes what is in neither weights nor
            constructor arguments (hooks, overridden methods): one random image is run to find out.
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
        _description: Mapping[str, Any]
        | None = None,  # of a model that was just built from it, so nothing else is in it
    ) -> None:
        super().__init__()
        given = unwrapped(model)
        source = as_timm(given)
        source_checks.check(source)
        plain = with_plain_head(source)
        if embedding is None:
            embedding = getattr(source, "embedding", False)
        self.units = (HEAD_DIM_UNIT, MLP_UNITS)
        self.sites = find_sites(plain)
        self.embedding = bool(embedding)
        rebuilt: nn.Module | None = None
        if _description is None:
            _description, rebuilt = architecture.described_and_built(plain)
        self.description = dict(_description) | ({"embedding": True} if embedding else {})
        self.data_config = architecture.merged_data_config(plain, data_config)
        self.origin: dict[str, Any] | None = getattr(plain, "origin", None)
        self.model: Any = self._elastic_copy(plain)
        size = self.data_config["input_size"]
        if rebuilt is not None and source is given:  # else `as_timm` has made and compared it
            rebuilt = architecture.filled(rebuilt, plain)
            ours = Subject(rebuilt, rebuilt), Subject(self.model, stages(self.model).answers)
            check_equal("cut", UnsupportedModelError, Subject(source, source), ours, size)
        self._cost, self._form = cost_model(self.model, self.sites, size), changes.form_of(self.model)
        self._frozen = frozen_names(self.model)
        self._shift = Shift()
        self._dense_outputs: DenseOutputs | None = None  # for the images of `contract`; `stratify` uses them
        self._seen: Seen | None = None  # the images of `contract`, if it kept moments of folds
        norm = last_norm(self.model)
        if norm is not None:
            norm.register_forward_hook(self._shift)
        self.strata: strata.Strata | None = None
        self.final_mean: FinalMean | None = None
        self.provenance: dict[str, Any] = {}
        self.frozen_for_serving = False
        self.method: Method = "default"
        self.register_load_state_dict_post_hook(_report_kept_moments)
        self.train(source.training)

    def _elastic_copy(self, plain: nn.Module) -> nn.Module:
        """A copy whose attention and MLP modules are elastic, without methods that are set on instances."""
        copied: Any = source_checks.whole_copy(plain)
        source_checks.drop_own_routines(copied)
        copied.embedding = self.embedding
        modules, self.uncut = elastic_sites(copied)
        for name, module in modules.items():
            block, _, leaf = name.rpartition(".")
            setattr(copied.get_submodule(block), leaf, module)
        made: nn.Module = copied
        return made

    @property
    def elastic(self) -> dict[str, ElasticSite]:
        """Site name -> elastic module.

        Raises:
            StrataViTError: One of them was taken out of the model, or another module put in its place.
        """
        return {site.name: site_of(self.model, site.name) for site in self.sites}

    @property
    def cost(self) -> CostModel:
        """What its sizes cost; measured again where the model has another head or image size than before.

        Raises:
            StrataViTError: The model was changed in a way that cannot be followed.
        """
        if changes.form_of(self.model) != self._form:
            self._follow()
        return self._cost

    @cost.setter
    def cost(self, cost: CostModel) -> None:
        self._cost = cost

    def _follow(self) -> None:
        """Brings description, image size and cost up to what the owner made of `model`."""
        before = self.description, self.data_config, self._cost, self._form
        with_plain_head(self.model, in_place=True)
        try:
            self.description = changes.description_now(self.description, self.model)
            size: Any = architecture.own_size(self.model, self.data_config["input_size"])
            self.data_config = self.data_config | {"input_size": size}
            self._cost, self._form = cost_model(self.model, self.sites, size), changes.form_of(self.model)
            changes.check_followed(self)
        except Exception:
            self.description, self.data_config, self._cost, self._form = before
            raise

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

        Raises:
            StrataViTError: A number is not a whole number of at least 1.
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
            logits: Tensor = model(images)
        return logits

    @contextmanager
    def at(self, spec: Mapping[str, int] | None = None, fixed: bool = False) -> Iterator[nn.Module]:
        """Runs `model` at a spec inside, in this thread or asyncio task alone; outside it runs at full width.

        Args:
            spec: Widths; sites that are not named run at full width.
            fixed: Promises that no weight changes inside and none needs a gradient: what compensation makes of the
                weights is then computed once, not at every call.

        Yields:
            `model`.

        Raises:
            StrataViTError: The spec does not fit; or blocks are recomputed in the backward pass (gradient
                checkpointing), which would come when the widths are gone.
        """
        widths = self.resolve(spec)
        if torch.is_grad_enabled() and not fixed:
            self._check_no_recomputing(widths)
        with run_at(self.elastic, widths, fixed), running(Run(shifts={self._shift: self.final_shift(widths)})):
            yield self.model

    def _check_no_recomputing(self, widths: Mapping[str, int]) -> None:
        full = all(widths[site.name] == site.width for site in self.sites)
        if not full and any(getattr(module, "grad_checkpointing", False) for module in self.model.modules()):
            raise StrataViTError(
                "gradient checkpointing runs blocks once more in the backward pass, at full width; call "
                "model.set_grad_checkpointing(False) to train sub-networks, or run them under torch.no_grad()"
            )

    def final_shift(self, widths: Mapping[str, int]) -> Tensor | None:
        """What is added to the last norm's bias at these widths, ``[C]``; None for nothing.

        Args:
            widths: Of every site.

        Returns:
            The vector, or None.
        """
        if self.final_mean is None or self.compensation != "full":
            return None
        share = self.cost.macs(widths) / self.cost.macs()
        return None if share >= 1 else self.final_mean.at(share)

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
    ) -> Self:
        """Sorts the knowledge inside every module, in place, without changing the function.

        One forward and one backward pass over the calibration images (the paper uses 1,024).

        Args:
            loader: Yields images ``[B, 3, H, W]``, ``(images,)``, ``(images, labels [B])``, or mappings of these:
                images under ``pixel_values``, ``image`` or ``images``, labels under ``labels`` or ``label``. The
                order does not matter.
            method: ``paper`` is exactly the paper (WPAC); ``default`` sorts by what each module adds to the
                residual stream and gathers what `compensation` needs. If None, what the criterion implies.
            criterion: What channels are sorted by: ``output`` (default method), ``wpac`` (paper), or a baseline
                (``random``, ``magnitude``, ``taylor``, ``hessian``, ``pca``); only ``output`` goes with ``default``.
            objective: What is differentiated, see `statistics.collect`; ``auto`` suits the method and the labels.
            seed: For ``random`` and for the objective ``sampled``.
            token_weight: Share of a token's weight that follows the gradient norm at the module's output
                (default method).

        Returns:
            self.

        Raises:
            StrataViTError: Bad images, labels or options.
        """
        method, criterion = resolve_method(method, criterion)
        with in_float32(self.model), self.at():
            facts, self._dense_outputs = sort_channels(self.model, loader, criterion, objective, seed, token_weight)
        if self._dense_outputs is not None:
            self._dense_outputs.seal(self.model)  # contraction keeps the function
        self._seen = None if self._dense_outputs is None else self._dense_outputs.seen
        self.frozen_for_serving = False
        self.strata, self.final_mean, self.method = None, None, method
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
    ) -> Self:
        """Makes the one-shot dropout list, down to the smallest size, in place; no training.

        Args:
            loader: The calibration images, several times over, in any order. Best those of `contract`, pixel by
                pixel (no random augmentation), and on the same object: each is then measured with moments that do
                not contain it. If they are others, a line on standard error says so.
            method: ``default`` measures at cut networks what one more unit brings (`walk`); ``paper`` ranks units by
                sensitivity of the module times Taylor importance, per MAC, with tails merged (method
                section 2). As set by `contract` if None.
            objective: ``paper``: for the Taylor importance, see `statistics.collect`.
            measure: ``paper``: of sensitivity, ``top1``, ``cost`` or ``auto``, see `sensitivity.bypass_sensitivity`.
            plan: ``default``: sizes and numbers of images.
            seed: ``paper``: for the objective ``sampled``.
            price: What a unit's importance is divided by: its MACs (paper), or its ``latency`` on the device that the
                weights are on.
            setting: For ``latency``; one image, eager, if None.

        Returns:
            self.

        Raises:
            StrataViTError: Bad images, labels or options.
        """
        method = self.method if method is None else known_method(method)
        cost = priced(self.cost, self.elastic, price, setting)
        known = self._dense_outputs
        if known is not None and not known.belong_to(self.model):
            known = None
        with in_float32(self.model), self.at():
            entries, final_mean, facts = build.make_list(
                self.model,
                self.sites,
                cost,
                loader,
                method,
                objective=objective,
                measure=measure,
                plan=plan,
                seed=seed,
                known=known,
                seen=self._seen,
            )
        self._dense_outputs = None
        if method != self.method:
            self.method = method
        self.strata, self.final_mean = strata.Strata(self.sites, entries), final_mean
        self.provenance["stratify"] = {"method": method, "price": price, "prices": cost.prices, **facts}
        return self

    # ---- cost --------------------------------------------------------------------------------------

    def resolve(self, spec: Mapping[str, int] | None) -> Spec:
        """The width of every site under a spec.

        Args:
            spec: Widths; sites that are not named are at full width. None is full width everywhere.

        Returns:
            A spec that names every site.

        Raises:
            StrataViTError: The spec names an unknown site or a width above the full one.
        """
        return full_spec(self.sites, spec)

    def macs(self, spec: Mapping[str, int] | None = None, attention: bool = False) -> int:
        """MACs per image, linear count; ``attention=True`` adds QK^T and AV. The dense model's without a spec.

        Args:
            spec: Widths; None is the dense model.
            attention: Count the products of attention, too.

        Returns:
            Multiply-accumulates per image.

        Raises:
            StrataViTError: The spec does not fit.
        """
        return self.cost.macs(self.resolve(spec), attention)

    def params(self, spec: Mapping[str, int] | None = None) -> int:
        """Parameters of the extracted model. The dense model's without a spec.

        Args:
            spec: Widths; None is the dense model.

        Returns:
            Number of parameters.

        Raises:
            StrataViTError: The spec does not fit.
        """
        biased = self.compensation != "none"
        calibrated = all(module.channel_mean.numel() for module in self.elastic.values())
        return self.cost.params(self.resolve(spec), biased, corrected=biased and calibrated)

    def budget(self, **asked: Unpack[BudgetArgs]) -> Budget:
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

        Returns:
            What was asked for and what was got of every budget, the reachable range, and the spec.

        Raises:
            BudgetError: No budget, an unreadable one, one outside the reachable range, or budgets that exclude
                each other.
            StrataViTError: There is no dropout list yet.
        """
        if self.strata is None:
            raise StrataViTError("no dropout list yet: call stratify(loader) first, or give a spec")
        positions = range(len(self.strata) + 1) if self.method == "default" else self.strata.group_ends()
        return find_sub_network(self, self.strata, positions, asked)

    def spec(self, **asked: Unpack[BudgetArgs]) -> Spec:
        """The widths of the sub-network that `budget` finds.

        Args:
            **asked: Budgets, see `budget`.

        Returns:
            Width of every site.

        Raises:
            BudgetError, StrataViTError: See `budget`.
        """
        return self.budget(**asked).spec

    def memory(self) -> Memory:
        """What the network holds in memory, by kind.

        Returns:
            Bytes of weights, means, second moments and specialised weights.
        """
        vectors = None if self.final_mean is None else self.final_mean.vectors
        return memory_of(self.state_dict().values(), self.elastic.values(), vectors)

    # ---- cut ---------------------------------------------------------------------------------------

    def extract(
        self, *, spec: Mapping[str, int] | None = None, verbose: bool = True, **asked: Unpack[BudgetArgs]
    ) -> nn.Module:
        """A plain small model for budgets or a spec: stock timm layers, no dependence on this object.

        Of the class that the source had, be it timm's or transformers'.

        Args:
            spec: Widths, in place of a budget.
            verbose: Print asked, got and reachable range to standard error.
            **asked: Budgets, see `budget`.

        Returns:
            A plain module in eval mode; maps images ``[B, C, H, W]`` to logits ``[B, classes]``.

        Raises:
            BudgetError, StrataViTError: See `budget` and `resolve`.
        """
        if spec is None:
            met = self.budget(**asked)
            spec = met.spec
            if verbose:
                print(met, file=sys.stderr)
        elif any(value is not None for value in asked.values()):
            raise BudgetError("give either a spec or a budget, not both")
        return as_source(self.small_at(spec))

    def small_at(self, widths: Mapping[str, int]) -> nn.Module:
        """The plain small model of a spec in timm's form, see `extract`.

        Args:
            widths: A spec.

        Returns:
            A timm model in eval mode.

        Raises:
            UnsupportedModelError: Other tools have put layers of theirs into `model`.
            StrataViTError: Hooks or replaced methods make `model` answer otherwise than what can be cut out of it.
        """
        widths = self.resolve(widths)
        source_checks.check_layers(self.model)
        small: Any = small_model(self.model, self.sites, widths, self.final_shift(widths))
        small.provenance = {
            "super_network": self.provenance,
            "spec": dict(widths),
            "macs": self.macs(widths),
            "params": self.params(widths),
            "dense_macs": self.macs(),
            "dense_params": self.params(),
            "dense_spec": dict(self.resolve(None)),
        }
        small.origin = self.origin
        small.embedding = self.embedding
        small.data_config = dict(self.data_config)
        small.source_args = dict(self.description["args"])
        if self.frozen_for_serving:  # see `specialise`
            set_frozen(small, self._frozen)
        changes.check_small(self, small, widths)
        made: nn.Module = small
        return made

    # ---- keep --------------------------------------------------------------------------------------

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
            self.frozen_for_serving = True
            self.requires_grad_(False)
        return self.memory()

    def forget_moments(self) -> None:
        """Drops second moments and all that was computed from them, as training makes them stale."""
        self.frozen_for_serving = False
        for module in self.elastic.values():
            module.moments, module.crossed = None, ()
            module.forget_last()

    def save(self, path: str | Path, overwrite: bool = False, moments: bool = True) -> None:
        """Writes a folder: ``model.safetensors`` (a timm checkpoint), ``moments.safetensors``, ``stratavit.json``.

        Args:
            path: Folder to write.
            overwrite: Replace a folder that is not empty.
            moments: Keep second moments and final mean, about two thirds of the size of the weights. Without them
                cut channels are replaced by their mean, and extracted models are less accurate.

        Raises:
            ArtifactError: The folder exists and is not empty (unless `overwrite`), or cannot be written.
        """
        if self.frozen_for_serving:
            raise ArtifactError(
                "the second moments were released by specialise(); save before, or specialise(moments=True)"
            )
        _ = self.cost  # follows a model that was changed
        source_checks.check(self.model)
        changes.check_followed(self)
        facts = {
            "method": self.method,
            "compensation": self.compensation if moments or self.compensation != "full" else "mean",
            "model": self.description,
            "origin": self.origin,
            "data_config": self.data_config,
            "units": list(self.units),
            "frozen": frozen_names(self.model),
            "strata": None if self.strata is None else self.strata.to_json(),
            "provenance": self.provenance,
        }
        tensors = moments_file.to_tensors(self.elastic, self.final_mean, second=moments)
        folder_format.write_saved(path, folder_format.SUPER, self.model, facts, overwrite, tensors)

    @classmethod
    def load(cls, path: str | Path, device: torch.device | str = "cpu", moments: bool = True) -> SuperNet:
        """Reads what `save` wrote; runs no code from the files.

        Args:
            path: The folder.
            device: Of the weights.
            moments: Read second moments, too; without them cut channels are replaced by their mean, and the whole
                family takes little more memory than the full model.

        Returns:
            The super-network, in eval mode on the device.

        Raises:
            ArtifactError: The folder is not a super-network's, or damaged.
        """
        model, content = folder_format.read_saved(path, folder_format.SUPER, device)
        net = cls(model, content["data_config"], _description=content["model"])
        try:
            net.method = content.get("method", "default")
            net.compensation = content.get("compensation", net.compensation)
        except StrataViTError as error:
            raise ArtifactError(f"{Path(path) / folder_format.JSON_FILE}: {error}") from error
        net.set_units(*content["units"])
        net.provenance = dict(content.get("provenance", {}))
        tensors, source = folder_format.read_moments(path, content, second=moments)
        found = moments_file.from_tensors(net.elastic, net.sites, int(net.model.num_features), tensors, source)
        net.final_mean = found if moments else None
        if not moments and net.compensation == "full":
            net.compensation = "mean"
        if content.get("strata") is not None:
            net.strata = strata.Strata.from_json(net.sites, content["strata"])
        return net


def _report_kept_moments(net: SuperNet, incompatible: Any) -> None:
    """Says that `load_state_dict` brings weights only: what is known of the channels stays that of before."""
    if any(module.channel_mean.numel() for module in net.elastic.values()):
        print(
            "load_state_dict: means and moments of the channels stay as they were; if these are the weights of another "
            "network, call contract(loader) and stratify(loader) again, or use SuperNet.load",
            file=sys.stderr,
        )
