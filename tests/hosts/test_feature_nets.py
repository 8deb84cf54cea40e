"""Backbones that timm builds with `features_only=True`: every kind of wrapper is cut as it is, alone and in a host."""

import architectures
import pytest
import timm
import torch
from helpers import enliven
from torch import nn

import stratavit
from stratavit import SuperNet, UnsupportedModelError
from stratavit.dropout_list.walk import Walk
from stratavit.hosts.converting import host_outputs, uncut_error

PLAN = Walk(states=((0.7, 1),), images=8)
LOADER = [torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1)]
SIZES = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 3, "num_heads": 2, "out_indices": (0, 2)}
WRAPPERS = {  # name of a model, arguments
    "FeatureGetterNet": ("vit_tiny_patch16_224", SIZES),
    "FeatureHookNet": ("vit_tiny_patch16_224", {**SIZES, "feature_cls": "hook"}),
    "FeatureListNet": ("swin_tiny_patch4_window7_224", {**architectures.SWIN, "out_indices": (0, 1)}),
    "FeatureDictNet": (
        "swin_tiny_patch4_window7_224",
        {**architectures.SWIN, "out_indices": (0, 1), "feature_cls": "dict"},
    ),
}
every_wrapper = pytest.mark.parametrize("wrapper", WRAPPERS)


def backbone(wrapper):
    name, sizes = WRAPPERS[wrapper]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return enliven(timm.create_model(name, features_only=True, **sizes)).eval()


class Pooled(nn.Module):
    """A host that reads all maps."""

    def __init__(self, wrapper):
        super().__init__()
        self.backbone = backbone(wrapper)

    def forward(self, images):
        maps = self.backbone(images)
        found = list(maps.values()) if isinstance(maps, dict) else maps
        return torch.stack([one.flatten(1).square().mean(dim=1) for one in found], dim=1)


@every_wrapper
def test_a_wrapper_alone_keeps_its_class_and_what_it_says_of_its_maps(wrapper):
    model = backbone(wrapper)
    assert type(model).__name__ == wrapper
    with pytest.raises(UnsupportedModelError, match=r'convert_part\(model, ""'):
        SuperNet(model)
    net = stratavit.convert_part(model, "", LOADER, plan=PLAN)
    spec = net.spec(macs=0.8)
    small = net.extract(spec=spec, verbose=False)
    assert type(small) is type(model)
    assert small.feature_info.channels() == model.feature_info.channels()
    assert small.feature_info.reduction() == model.feature_info.reduction()
    assert net.params(spec) == sum(parameter.numel() for parameter in small.parameters())
    full, ours = host_outputs(model, LOADER[0]), host_outputs(small, LOADER[0])
    with net.at(spec) as elastic:
        theirs = host_outputs(elastic.part, LOADER[0])
    for one, other, dense in zip(ours, theirs, full, strict=True):
        assert one.shape == dense.shape
        assert (one - other).abs().max() < 1e-5 * dense.abs().max()
    assert any((one - dense).abs().max() > 1e-3 * dense.abs().max() for one, dense in zip(ours, full, strict=True))


@every_wrapper
def test_a_wrapper_in_a_host_comes_back_from_a_state_dict(wrapper):
    host = Pooled(wrapper).eval()
    net = stratavit.convert_part(host, "backbone", LOADER, plan=PLAN)
    assert uncut_error(net, LOADER[0]) < 1e-5
    net.place(macs=0.8, verbose=False)
    fresh = stratavit.resize_parts(Pooled(wrapper).eval(), stratavit.part_sizes(host))
    fresh.load_state_dict(host.state_dict())
    assert torch.equal(host_outputs(fresh, LOADER[0])[0], host_outputs(host, LOADER[0])[0])
