"""Which models can be cut, how, and which are refused with a sentence; what is read off a model."""

import copy
import inspect
from itertools import pairwise

import architectures
import pytest
import timm
import torch
from helpers import make_images, make_model
from hypothesis import given
from hypothesis import strategies as st
from timm.models.beit import Beit
from timm.models.eva import Eva
from timm.models.vision_transformer import ParallelScalingBlock, VisionTransformer
from torch import nn

from stratavit import ArtifactError, StrataViTError, SuperNet, UnsupportedModelError
from stratavit.artifacts import timm_config
from stratavit.elastic.site import attention_steps, mlp_steps
from stratavit.models import architecture
from stratavit.models.families import elastic_sites, find_sites, stages

SMALL = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2, "num_classes": 3}


def test_two_sites_per_block_in_order_of_execution(source):
    sites = find_sites(source)
    assert [site.name for site in sites] == ["blocks.0.attn", "blocks.0.mlp", "blocks.1.attn", "blocks.1.mlp"]
    for site in sites:
        module = source.get_submodule(site.name)
        if site.kind == "attention":
            expected = (module.head_dim, module.num_heads, module.qkv.bias is not None, module.proj.bias is not None)
        else:
            expected = (module.fc1.out_features, 1, module.fc1.bias is not None, module.fc2.bias is not None)
        assert (site.width, site.heads, site.in_biases > 0, site.out_bias) == expected
        assert site.dim == source.embed_dim


def test_units_of_known_widths():
    assert attention_steps(64) == (0, 8, 16, 24, 32, 40, 48, 56, 64)
    assert attention_steps(12) == (0, 8, 12)
    assert mlp_steps(768) == tuple(range(0, 769, 24))
    assert mlp_steps(3) == (0, 1, 2, 3)


@given(st.integers(1, 5000))
def test_units_cover_every_channel_once(width):
    for steps in (attention_steps(width), mlp_steps(width)):
        assert (steps[0], steps[-1]) == (0, width)
        assert all(a < b for a, b in pairwise(steps))
    sizes = [b - a for a, b in pairwise(mlp_steps(width))]
    assert len(sizes) == min(32, width)
    assert max(sizes) - min(sizes) <= 1
    assert max(b - a for a, b in pairwise(attention_steps(width))) <= 8


def test_stages_compose_to_the_model(source):
    images = make_images(2)
    with torch.no_grad():
        assert torch.equal(stages(source).outputs(images), source(images))


class NarrowForward(VisionTransformer):
    def forward_features(self, x, attn_mask=None, is_causal=False):
        return super().forward_features(x, attn_mask, is_causal)


def vit(**options):
    return lambda: VisionTransformer(**SMALL | options)


def headed(model):
    model.head = nn.Linear(32, 7)
    return model


def with_part(path, part):
    def make():
        model = make_model("plain")
        parent, _, leaf = path.rpartition(".")
        setattr(model.get_submodule(parent), leaf, part)
        return model

    return make


REFUSED = {
    "not a ViT": (lambda: timm.create_model("resnet18"), ["ResNet", "VisionTransformer", "Eva", "stratavit models"]),
    "nothing to cut": (vit(scale_attn_norm=True, scale_mlp_norm=True), ["blocks.0.attn.norm"]),
    "parallel blocks": (vit(block_fn=ParallelScalingBlock), ["blocks.0", "ParallelScalingBlock"]),
    "classes of every token": (vit(num_classes=7, global_pool=""), ["global_pool", "num_classes=0", "'token'"]),
    "a head put on every token": (lambda: headed(vit(num_classes=0, global_pool="")()), ["global_pool"]),
    "maps with channels in front": (
        lambda: architectures.make("davit_tiny", num_classes=0, global_pool=""),
        ["global_pool"],
    ),
    "own forward pass": (lambda: NarrowForward(**SMALL), ["forward_features", "NarrowForward"]),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_cut_is_refused_by_name_and_reason(case):
    make, words = REFUSED[case]
    for action in (find_sites, SuperNet):
        with pytest.raises(UnsupportedModelError) as caught:
            action(make())
        message = str(caught.value)
        assert all(word in message for word in words), message
        assert "\n" not in message


def grouped():
    if "num_kv_heads" not in inspect.signature(Eva).parameters:
        pytest.skip(f"timm {timm.__version__} has no attention with grouped queries")
    options = {"num_kv_heads": 1, "attn_type": "rope", "qkv_fused": False}
    return timm.create_model("vit_small_patch16_dinov3", **SMALL, **options)


UNCUT = {
    "scale norm": (vit(scale_attn_norm=True), "blocks.0.attn", ".norm"),
    "norm inside the MLP": (vit(scale_mlp_norm=True), "blocks.1.mlp", ".norm"),
    "gated attention": (with_part("blocks.1.attn.gate", nn.Linear(32, 32)), "blocks.1.attn", ".gate"),
    "foreign attention": (with_part("blocks.1.attn", nn.Identity()), "blocks.1.attn", "Identity"),
    "foreign layer": (with_part("blocks.1.mlp.fc2", nn.Bilinear(2, 2, 2)), "blocks.1.mlp", ".fc2: expected a Linear"),
    "grouped queries": (grouped, "blocks.0.attn", ".v_proj"),
}


@pytest.mark.parametrize("case", UNCUT)
def test_a_module_that_cannot_be_cut_stays_with_a_reason(case):
    make, name, words = UNCUT[case]
    found, uncut = elastic_sites(make())
    assert name not in found
    assert len(found) + len(uncut) == 4
    assert uncut[name].startswith(name)
    assert words in uncut[name]


def test_part_of_a_data_config_is_enough():
    net = SuperNet(make_model("plain"), data_config={"mean": (0.1, 0.2, 0.3)})
    assert net.data_config["mean"] == (0.1, 0.2, 0.3)
    assert net.data_config["input_size"] == (3, 32, 32)
    with pytest.raises(StrataViTError, match="data_config: 'means'"):
        SuperNet(make_model("plain"), data_config={"means": (0.1, 0.2, 0.3)})


def test_what_is_saved_is_not_compared():
    """Buffers that are part of the weights, as those of batch norms, may hold anything."""
    model = make_model("plain")
    model.patch_embed.norm = nn.BatchNorm1d(32)
    built = copy.deepcopy(model)
    built.patch_embed.norm.running_mean += 1
    assert architecture.difference(built, model) is None


def test_a_model_of_no_fixed_size():
    model = make_model("plain")
    model.patch_embed.img_size = None
    assert architecture.resolve_data_config(model)["input_size"] == (3, 224, 224)


def test_a_beit_without_biases_of_qkv_is_refused():
    with pytest.raises(ArtifactError):
        SuperNet(Beit(**SMALL, qkv_bias=False))


def test_arguments_that_an_architecture_sets_itself(monkeypatch):
    """Then timm alone cannot load by the config.json."""
    model = timm.create_model("vit_tiny_patch16_224", img_size=32)
    description, config = architecture.describe(model), architecture.resolve_data_config(model)
    assert not timm_config.needs_stratavit(timm_config.timm_config(description, config))
    built = architecture.build(description, device="meta")

    def twice(*args, **options):
        raise TypeError("got multiple values for keyword argument 'depth'")

    monkeypatch.setattr(architecture, "build", lambda *args, **options: built)
    monkeypatch.setattr(timm, "create_model", twice)
    assert timm_config.needs_stratavit(timm_config.timm_config(description, config))
