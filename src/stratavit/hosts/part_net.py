"""`PartNet`: the super-network of a part of a larger model, which is cut in place."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from typing_extensions import Unpack

from stratavit.budgets.constraints import BudgetArgs, find_spec
from stratavit.elastic.base import ElasticSite
from stratavit.elastic.site import HEAD_DIM_UNIT, MLP_UNITS
from stratavit.errors import ArtifactError, UnsupportedModelError
from stratavit.hosts.calls import Calls
from stratavit.hosts.costs import part_cost
from stratavit.hosts.sizes import forget_sizes, state_sizes
from stratavit.interop.part_sites import elastic_sites_in, sizes_of, small_of
from stratavit.models import small_model
from stratavit.models.cost import CostModel
from stratavit.models.families.hosted import HostedPart
from stratavit.models.final_mean import Shift
from stratavit.models.freezing import frozen_names
from stratavit.models.source_checks import check_layers, check_weights, whole_copy
from stratavit.supernet import SuperNet
from stratavit.utils.model import eval_mode, full_products, model_device, model_dtype, temporarily

SAMPLE = 8  # images that tell the energy of maps, and which sites the host reads


class PartNet(SuperNet):
    """The super-network of a part of a host: made by `convert_part`, any size of it can be put in the part's place.

    What `SuperNet` has that needs a timm model, that is files of the super-network and merging of tokens, it has not.

    Args:
        host: The model; it is not changed until `place`.
        name: Full name of the part; empty for the host itself.
        calls: How the host calls it.
        outputs: Numbers of the tensors of its output that the host reads.

    Attributes:
        host, name: As given.
        sample: Some images as the host gives them to the part, ``[B, C, H, W]``.

    Raises:
        UnsupportedModelError: Nothing of the part can be cut, or what can is not read by the host.
    """

    def __init__(self, host: nn.Module, name: str, calls: Calls, outputs: list[int]) -> None:
        nn.Module.__init__(self)
        stock = host.get_submodule(name)
        check_layers(stock)
        check_weights(stock)
        self._host, self.name = (host, stock), name  # a tuple: no modules of this network
        part = whole_copy(stock, _configs(stock))
        leaf = name.rpartition(".")[2] or "model"
        how = (calls.images, calls.unsqueezed, calls.arguments, calls.by_image, outputs, calls.packed)
        self.model: Any = HostedPart(leaf, part, *how).eval()
        self.sample = sample = calls.batches[0][:SAMPLE].to(model_device(stock), model_dtype(stock))
        _scale_maps(self.model, sample)
        found, self.uncut = _elastic(self.model, sample)
        self.sites = tuple(module.site(key) for key, module in found.items())
        self._cost = part_cost(self.model, found, self.sites, sample[:1])
        self.description: dict[str, Any] = {}
        self.data_config: dict[str, Any] = {"input_size": tuple(sample.shape[1:])}
        self._form: tuple[Any, ...] = ()
        self._shift, self.origin, self.embedding = Shift(), None, True
        self.units = (HEAD_DIM_UNIT, MLP_UNITS)
        self._dense_outputs = self._seen = None
        self.strata = self.joint_strata = self.final_mean = None
        self.provenance: dict[str, Any] = {"part": name, "host": type(host).__name__}
        self.frozen, self.frozen_for_serving = frozen_names(self.model), False
        self.method = "default"

    @property
    def host(self) -> nn.Module:
        """The model that holds the part."""
        return self._host[0]

    @property
    def cost(self) -> CostModel:
        """What the sizes of the part cost, without the rest of the host."""
        return self._cost

    def params(self, spec: Mapping[str, int] | None = None) -> int:
        """Parameters of the small part, see `SuperNet.params`."""
        return small_model.params_at(self, self.resolve(spec), folded=False)

    def extract(
        self, *, spec: Mapping[str, int] | None = None, verbose: bool = True, **asked: Unpack[BudgetArgs]
    ) -> nn.Module:
        """A small part, of the class and with the interface of the part; the host stays as it is.

        Args:
            spec: Widths, in place of a budget.
            verbose: Print asked, got and reachable range to standard error.
            **asked: Budgets, see `SuperNet.budget`; they count the part alone.

        Returns:
            A module in eval mode, to be called as the host calls the part.

        Raises:
            BudgetError, StrataViTError: See `SuperNet.extract`.
        """
        widths = find_spec(self, spec, verbose, asked)
        small = self.small_at(widths)
        own = {key: copy.deepcopy(config) for key, config in _configs(small).items()}  # the host's stays as it is
        for module in small.modules():
            config = module.__dict__.get("config")
            if config is not None:
                module.config = own[id(config)]
        state_sizes(small, "", self.sizes(widths, small))
        return small

    def place(
        self, *, spec: Mapping[str, int] | None = None, verbose: bool = True, **asked: Unpack[BudgetArgs]
    ) -> nn.Module:
        """Puts a small part in the place of the part, and its sizes into the host's configuration.

        Args:
            spec, verbose, asked: See `extract`.

        Returns:
            The host, changed in place.

        Raises:
            BudgetError, StrataViTError: See `SuperNet.extract`; or the part is the host itself.
        """
        if not self.name:
            raise UnsupportedModelError("place: the part is the model itself, which has no host; call extract")
        widths = find_spec(self, spec, verbose, asked)
        small = self.small_at(widths).train(self.host.get_submodule(self.name).training)
        self.host.set_submodule(self.name, small)
        state_sizes(self.host, self.name, self.sizes(widths, small))
        return self.host

    def restore(self) -> nn.Module:
        """Puts the part back as it was.

        Returns:
            The host, changed in place.
        """
        if self.name:
            self.host.set_submodule(self.name, self._host[1])
            forget_sizes(self.host, self.name)
        return self.host

    def small_at(self, widths: Mapping[str, int]) -> nn.Module:
        """The small part of a spec; it shares its configuration with the host.

        Args:
            widths: A spec.

        Returns:
            A module in eval mode, in the type and on the device of the part.
        """
        widths = self.resolve(widths)
        replaced: dict[int, Any] = _configs(self.model.part)
        for site, elastic in zip(self.sites, self.elastic.values(), strict=True):
            replaced[id(elastic)] = small_of(site, elastic, widths[site.name])
        return whole_copy(self.model.part, replaced).eval()

    def sizes(self, widths: Mapping[str, int], small: nn.Module) -> dict[str, dict[str, Any]]:
        """Numbers of the cut modules, by their names in the part, see `part_sites.resize`.

        Args:
            widths: A spec.
            small: The small part of it.

        Returns:
            Name -> plain numbers.
        """
        start = len(self.model.name) + 1
        return {
            name[start:]: sizes_of(module, widths[name], small.get_submodule(name[start:]))
            for name, module in self.elastic.items()
        }

    def save(self, path: str | Path, overwrite: bool = False, moments: bool = True) -> NoReturn:
        """Refused: what is kept is the host with a small part in it.

        Args:
            path, overwrite, moments: See `SuperNet.save`.

        Raises:
            ArtifactError: Always.
        """
        raise ArtifactError(f"{path}: the super-network of a part has no file; place a size of it and save the host")

    @classmethod
    def load(cls, path: str | Path, device: torch.device | str = "cpu", moments: bool = True) -> NoReturn:
        """Refused, see `save`.

        Args:
            path, device, moments: See `SuperNet.load`.

        Raises:
            ArtifactError: Always.
        """
        raise ArtifactError(f"{path}: the super-network of a part has no file; see load_transformers and resize_parts")


def _configs(part: nn.Module) -> dict[int, Any]:
    """The configurations that modules of a part refer to, for `copy.deepcopy`: shared with the host, not copied."""
    found = [module.__dict__.get("config") for module in part.modules()]
    return {id(config): config for config in found if config is not None}


@torch.no_grad()
def _scale_maps(model: HostedPart, sample: Tensor) -> None:
    """Scales every map that the host reads to length 1, on average over images."""
    with eval_mode(model), full_products():
        energies = [one.float().flatten(1).square().sum(dim=1).mean() for one in model.maps(sample)]
    count = len(energies)
    model.scales = [float((count * energy).clamp_min(1e-12).rsqrt()) for energy in energies]


def _elastic(model: HostedPart, sample: Tensor) -> tuple[dict[str, ElasticSite], dict[str, str]]:
    """Puts elastic modules into a part; those of which the host reads nothing stay uncut."""
    found, uncut = elastic_sites_in(model)
    outs = {name: module.out.weight for name, module in found.items()}
    if not found:
        raise UnsupportedModelError(
            f"cannot cut this {type(model.part).__name__}: "
            f"{next(iter(uncut.values()), 'it holds no attention or MLP module of a known kind')}"
        )
    watched = temporarily("requires_grad", dict.fromkeys(outs.values(), True))
    with watched, torch.enable_grad(), eval_mode(model):
        total = model(sample[:1]).float().square().sum()
        gradients: tuple[Tensor | None, ...] = torch.autograd.grad(total, list(outs.values()), allow_unused=True)
    for name, gradient in zip(outs, gradients, strict=True):
        if gradient is None:
            uncut[name] = f"{name}: the host does not read what it adds"
            del found[name]
    if not found:
        raise UnsupportedModelError(f"cannot cut this {type(model.part).__name__}: {next(iter(uncut.values()))}")
    for name, module in found.items():
        model.set_submodule(name, module)
    return found, uncut
