"""Small random models, images and independent reference computations that several test modules share."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from hypothesis import strategies as st
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

import stratavit
from stratavit.data.pixels import Keyed, keys_of
from stratavit.dropout_list.walk import Walk
from stratavit.elastic.delta import Delta

CLASSES = 7
_SMALL = {
    "img_size": 32,
    "patch_size": 8,
    "num_classes": CLASSES,
    "embed_dim": 32,
    "depth": 2,
    "num_heads": 2,
    "mlp_ratio": 2.0,
}
METHODS = ("default", "mean", "paper")  # of `make_net`
PLAN = Walk(states=((0.7, 1), (0.5, 1)), images=12)  # a dropout list in few passes
FAMILIES = {
    "plain": {},
    "no_bias": {"qkv_bias": False, "proj_bias": False},
    "layer_scale": {"init_values": 1e-5, "no_embed_class": True},
    "avg_pool": {"global_pool": "avg", "fc_norm": True, "class_token": False},
    "registers": {"reg_tokens": 3, "no_embed_class": True},
    "odd_widths": {"embed_dim": 36, "num_heads": 3, "mlp_ratio": 1.4},  # head_dim 12, MLP 50
    "distilled": None,  # timm's subclass with two class tokens and two heads
}


def make_model(family: str, seed: int = 0, dtype: torch.dtype = torch.float32) -> VisionTransformer:
    """A small model of a family in eval mode, its weights large enough for differences to show."""
    if family == "distilled":
        model = timm.create_model("deit_tiny_distilled_patch16_224", **_SMALL)
    else:
        model = VisionTransformer(**(_SMALL | FAMILIES[family]))
    return enliven(model, seed).to(dtype).eval()


def enliven(model: nn.Module, seed: int = 0) -> nn.Module:
    """Gives every weight a random value; gains stay near 1."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            gain = name.endswith("gamma") or (name.endswith("weight") and ("norm" in name or "ln_" in name))
            parameter.copy_(1 + 0.1 * noise if gain else 0.18 * noise)
    return model


def make_images(count: int = 12, seed: int = 1, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(count, 3, 32, 32, generator=torch.Generator().manual_seed(seed)).to(dtype)


def make_batches(sizes: tuple[int, ...] = (5, 4, 3), dtype: torch.dtype = torch.float32) -> list[tuple[Tensor, Tensor]]:
    """Labelled calibration batches: the same images whatever the sizes, as long as their sum is the same."""
    count = sum(sizes)
    labels = torch.randint(0, CLASSES, (count,), generator=torch.Generator().manual_seed(2))
    return list(zip(make_images(count, dtype=dtype).split(sizes), labels.split(sizes), strict=True))


def keyed(images: Tensor) -> Keyed:
    """Images ``[B, C, H, W]`` as a feed gives them."""
    return Keyed(images.unbind(), keys_of(images))


@cache
def make_net(family: str, method: str = "default", stratified: bool = False) -> stratavit.SuperNet:
    """A contracted super-network. Shared between tests: copy it before changing it.

    Args:
        method: ``default`` or ``paper``; ``mean`` is ``default`` with all tokens alike, where only the mean of cut
            channels is kept, so that it can be measured on the stock model.
    """
    options = {"token_weight": 0.0} if method == "mean" else {"method": method}
    net = stratavit.SuperNet(make_model(family)).contract(make_batches(), **options).eval()
    if stratified:
        net.stratify(make_batches(), plan=PLAN)
    if method == "mean":
        net.compensation = "mean"
    return net


def change_weights(net: stratavit.SuperNet, size: float = 0.1) -> None:
    """Gives every site a random change of its weights, as recovery of all sizes learns one."""
    generator = torch.Generator().manual_seed(2)
    for module in net.elastic.values():
        module.delta = Delta(module.weights_at(module.full_width))
        for part in module.delta.buffers():
            part.copy_(size * torch.randn(part.shape, generator=generator))


def stock_copy(source: nn.Module, net: stratavit.SuperNet) -> nn.Module:
    """The stock timm model with the super-network's weights, loaded strictly."""
    model = copy.deepcopy(source)
    model.load_state_dict(net.model.state_dict(), strict=True)
    return model.eval()


def spec_strategy(family: str) -> st.SearchStrategy[dict[str, int]]:
    """Specs of a family: each site left out, or at any width, 0 and full among the likeliest."""
    sites = make_net(family).sites
    widths = {site.name: st.sampled_from([0, 1, site.width]) | st.integers(0, site.width) for site in sites}
    return st.fixed_dictionaries({}, optional=widths)


def tensors_of(thing: Any) -> dict[int, int]:
    """All tensors that an object holds, wherever: storage address -> bytes."""
    found, seen, left = {}, set(), [thing]
    while left:
        one = left.pop()
        if id(one) in seen:
            continue
        seen.add(id(one))
        if isinstance(one, Tensor):
            found[one.untyped_storage().data_ptr()] = one.untyped_storage().nbytes()
        elif isinstance(one, dict):
            left += one.values()
        elif isinstance(one, list | tuple):
            left += one
        elif hasattr(one, "__dict__"):
            left += vars(one).values()
    return found


def relative_error(found: Tensor, expected: Tensor) -> float:
    """Largest difference over the largest expected value."""
    assert found.shape == expected.shape
    return float((found - expected).abs().max() / expected.abs().max())


def same_tensors(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> bool:
    """Whether two state dicts have the same tensors of the same types under the same names, bit for bit."""
    return one.keys() == other.keys() and all(
        one[name].dtype == other[name].dtype and torch.equal(one[name], other[name]) for name in one
    )


def out_layers(model: nn.Module) -> dict[str, nn.Linear]:
    """Site name -> the linear map out of its channels, of a stock model."""
    layers = {}
    for index, block in enumerate(model.blocks):
        layers |= {f"blocks.{index}.attn": block.attn.proj, f"blocks.{index}.mlp": block.mlp.fc2}
    return layers


def measured_inputs(model: nn.Module, images: Tensor) -> dict[str, Tensor]:
    """What every `proj` and `fc2` of a stock model reads, ``[tokens, channels]`` float64."""
    inputs: dict[str, Tensor] = {}

    def remember(name: str):
        def hook(module, args):
            inputs[name] = args[0].double().flatten(0, 1)

        return hook

    handles = [layer.register_forward_pre_hook(remember(name)) for name, layer in out_layers(model).items()]
    with torch.no_grad():
        model(images)
    for handle in handles:
        handle.remove()
    return inputs


def measured_means(model: nn.Module, images: Tensor) -> dict[str, Tensor]:
    """Mean input of every `proj` and `fc2` of a stock model over all tokens, ``[channels]`` float64."""
    return {name: tokens.mean(dim=0) for name, tokens in measured_inputs(model, images).items()}


def cut_channels(heads: int, full: int, width: int) -> Tensor:
    """Which of the channels that `proj` / `fc2` reads are cut, ``[heads*full]``."""
    return (torch.arange(full) >= width).repeat(heads)


def regression(tokens: Tensor, cut: Tensor, ridge: float = 1e-3) -> Tensor:
    """``B`` of the prediction ``mean_d + B (x_k - mean_k)`` of cut channels by kept ones, ``[cut, kept]``."""
    covariance = torch.cov(tokens.T, correction=0)
    regularised = covariance + ridge * covariance.trace() / len(covariance) * torch.eye(len(covariance)).double()
    return covariance[cut][:, ~cut] @ torch.linalg.inv(regularised[~cut][:, ~cut])


def masked(
    model: nn.Module, spec: dict[str, int], means: dict[str, Tensor] | None, inputs: dict[str, Tensor] | None = None
) -> nn.Module:
    """The full-width stock model with cut channels switched off by hooks: what a sub-network must compute.

    Cut coordinates of q and k are zeroed, so that timm's own ``d**-0.5`` stays the scale. Cut channels
    that `proj` / `fc2` reads are replaced by their mean, or by zero where `means` is None (the paper);
    then a module with nothing left adds nothing at all. With `inputs`, what all channels were on the
    calibration images, they are replaced by their regression on the kept ones instead.
    """
    model = copy.deepcopy(model)
    for name, layer in out_layers(model).items():
        module = model.get_submodule(name)
        heads = module.num_heads if name.endswith("attn") else 1
        full = layer.in_features // heads
        width = spec.get(name, full)
        cut = cut_channels(heads, full, width)
        fill = torch.zeros(layer.in_features) if means is None else means[name]
        slope = None if inputs is None or width in (0, full) else regression(inputs[name], cut)

        def replace(_, args, cut=cut, fill=fill, slope=slope):
            fill = fill.to(args[0])
            filled = torch.where(cut, fill, args[0])
            if slope is not None:
                filled[..., cut] += (args[0][..., ~cut] - fill[~cut]) @ slope.to(fill).T
            return (filled,)

        def zero_cut(_, args, output, cut=cut):
            q, k, v = output.chunk(3, dim=-1)
            return torch.cat([q.masked_fill(cut, 0), k.masked_fill(cut, 0), v], dim=-1)

        layer.register_forward_pre_hook(replace)
        if heads > 1:
            module.qkv.register_forward_hook(zero_cut)
        if width == 0 and means is None:
            module.register_forward_hook(lambda _, args, output: torch.zeros_like(output))
    return model


class Bomb:
    """Makes a file when unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def stopped_after_rename(monkeypatch: pytest.MonkeyPatch, number: int, stop: type[BaseException]) -> None:
    """The nth rename is done, then the program is told to stop, as a signal may at any moment."""
    rename, done = Path.rename, []

    def renamed(self: Path, to: Path) -> None:
        rename(self, to)
        done.append(to)
        if len(done) == number:
            raise stop

    monkeypatch.setattr(Path, "rename", renamed)


MIXED = {"blocks.0.attn": 4, "blocks.0.mlp": 0, "blocks.1.attn": 0, "blocks.1.mlp": 33}
LOADERS = {"super": stratavit.SuperNet.load, "small": stratavit.load}  # folder of `save_both` -> what reads it


def save_both(path: Path) -> Path:
    """Folders of a super-network and of a sub-network below `path`."""
    net = make_net("plain", stratified=True)
    net.save(path / "super")
    stratavit.save(net.extract(spec=MIXED, verbose=False), path / "small")
    return path


def copy_of(root: Path, path: Path) -> Path:
    """Copies of folders, which a test may change."""
    return Path(shutil.copytree(root, path, dirs_exist_ok=True))


def older(folder: Path, edit: Callable[[dict[str, Any]], Any] = len) -> None:
    """Makes a folder one of an older release, without hashes: what was changed is found by its meaning."""
    path = folder / "stratavit.json"
    content = json.loads(path.read_text())
    content.pop("hashes", None)
    edit(content)
    path.write_text(json.dumps(content))
