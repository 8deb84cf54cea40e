"""`SuperNet`: the object users hold. It joins the parts; the work is done in theirs."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import Unpack

from stratavit import architecture, artifacts, following, intake, strata
from stratavit.answers import Answers
from stratavit.classifier import with_plain_head
from stratavit.conversion import Convertible
from stratavit.cost import CostModel, cost_model
from stratavit.elastic import ElasticSite, run_at, site_of
from stratavit.errors import BudgetError, StrataViTError
from stratavit.extract import small_model
from stratavit.families import elastic_sites, find_sites, last_norm, stages
from stratavit.fidelity import Subject, check_cut
from stratavit.final_mean import FinalMean, Shift
from stratavit.foreign import as_source, as_timm
from stratavit.freezing import frozen_names, set_frozen
from stratavit.limits import Asked
from stratavit.running import Run, running
from stratavit.sizes import Method
from stratavit.structure import HEAD_DIM_UNIT, MLP_UNITS
from stratavit.wrappers import unwrapped


class SuperNet(Convertible):
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
        whole: Name -> reason of attention and MLP modules that cannot be cut and stay as they are.
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

    embedding: bool

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
        intake.check(source)
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
            check_cut(
                source, architecture.filled(rebuilt, plain), Subject(self.model, stages(self.model).answers), size
            )
        self._cost, self._form = cost_model(self.model, self.sites, size), following.form_of(self.model)
        self._frozen = frozen_names(self.model)
        self._shift = Shift()
        self._answers: Answers | None = None
        norm = last_norm(self.model)
        if norm is not None:
            norm.register_forward_hook(self._shift)
        self.strata: strata.Strata | None = None
        self.final_mean: FinalMean | None = None
        self.provenance: dict[str, Any] = {}
        self.released = False
        self.method: Method = "default"
        self.train(source.training)

    def _elastic_copy(self, plain: nn.Module) -> nn.Module:
        """A copy whose attention and MLP modules are elastic, without methods that are set on instances."""
        copied: Any = intake.whole_copy(plain)
        intake.drop_own_routines(copied)
        copied.embedding = self.embedding
        modules, self.whole = elastic_sites(copied)
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
        if following.form_of(self.model) != self._form:
            self._follow()
        return self._cost

    @cost.setter
    def cost(self, cost: CostModel) -> None:
        self._cost = cost

    def _follow(self) -> None:
        """Brings description, image size and cost up to what the owner made of `model`."""
        before = self.description, self.data_config, self._cost, self._form
        following.plain_heads(self.model)
        try:
            self.description = following.description_now(self)
            size: Any = architecture.own_size(self.model, self.data_config["input_size"])
            self.data_config = self.data_config | {"input_size": size}
            self._cost, self._form = cost_model(self.model, self.sites, size), following.form_of(self.model)
            following.check_followed(self, self.description)
        except Exception:
            self.description, self.data_config, self._cost, self._form = before
            raise

    # ---- execution --------------------------------------------------------------------------------

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
        """What is added to the last norm's bias at these widths, ``[C]``; None for nothing."""
        if self.final_mean is None or self.compensation != "full":
            return None
        share = self.cost.macs(widths) / self.cost.macs()
        return None if share >= 1 else self.final_mean.at(share)

    def source_copy(self) -> nn.Module:
        """A copy of the full model as it is, to teach by."""
        return intake.whole_copy(self.model).requires_grad_(False).eval()

    # ---- extraction -------------------------------------------------------------------------------

    def extract(
        self, *, spec: Mapping[str, int] | None = None, verbose: bool = True, **asked: Unpack[Asked]
    ) -> nn.Module:
        """A plain small model for budgets or a spec: stock timm layers, no dependence on this object.

        Of the class that the source had, be it timm's or transformers'.

        Args:
            spec: Widths, in place of a budget.
            verbose: Print asked, got and reachable range to standard error.
            **asked: Budgets, see `budget`.

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

        Raises:
            UnsupportedModelError: Other tools have put layers of theirs into `model`.
            StrataViTError: Hooks or replaced methods make `model` answer otherwise than what can be cut out of it.
        """
        widths = self.resolve(widths)
        intake.check_layers(self.model)
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
        if self.released:  # all of it was frozen to be served, see `specialise`
            set_frozen(small, self._frozen)
        following.check_small(self, small, widths)
        made: nn.Module = small
        return made

    # ---- files ------------------------------------------------------------------------------------

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
        artifacts.save_supernet(self, path, overwrite, moments)

    @classmethod
    def load(cls, path: str | Path, device: torch.device | str = "cpu", moments: bool = True) -> SuperNet:
        """Reads what `save` wrote; runs no code from the files.

        Args:
            path: The folder.
            device: Of the weights.
            moments: Read second moments, too; without them cut channels are replaced by their mean, and the whole
                family takes little more memory than the full model.

        Raises:
            ArtifactError: The folder is not a super-network's, or damaged.
        """
        return artifacts.load_supernet(cls, path, device, moments)
