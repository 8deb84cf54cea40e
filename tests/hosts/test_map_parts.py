"""Image encoders whose attention reads maps of tokens, with one layer for q, k and v: SAM, SAM 2, ViTDet."""

import copy

import pytest
import torch
import transformers as hf
from hosted_models import CLASSES, make, sam

from stratavit.interop.part_sites import elastic_sites_in
from stratavit.interop.transformers.map_sites import TheirMap
from stratavit.interop.transformers.small_modules import small_module

NAMES = ("SamVisionModel", "Sam2VisionModel", "VitDetModel")


def sites(model):
    return [site for site in elastic_sites_in(model)[0].values() if isinstance(site, TheirMap)]


def tokens_of(found):
    return found[0] if isinstance(found, tuple) else found


@pytest.mark.parametrize("name", NAMES)
def test_a_cut_module_is_the_full_one_without_some_channels(name):
    """The stock module with zeros in their rows computes the same; windows and maps of any size that it accepts."""
    for site in sites(make(CLASSES[name])):
        stock, width = copy.deepcopy(site.stock), site.full_width // 2
        small = small_module(site, width)
        with torch.no_grad():
            for tensor in (stock.qkv.weight, stock.qkv.bias):
                for one in tensor.unflatten(0, (3, site.heads, -1))[0 if site.tied else 2 :]:
                    one[:, width:] = 0
        x = torch.randn(2, 3, 3, stock.qkv.in_features)
        assert type(small) is type(stock)
        assert small.qkv.out_features == site.heads * (3 * width if site.tied else 2 * site.full_width + width)
        found, expected = small(x), stock(x)
        torch.testing.assert_close(tokens_of(found), tokens_of(expected), rtol=1e-5, atol=1e-5)
        assert type(found) is type(expected)


def test_both_forms_of_sams_attention_compute_the_same():
    """transformers has a class for eager attention, and one for torch's kernels."""
    config = sam().config.vision_config
    state, images = make(CLASSES["SamVisionModel"]).state_dict(), torch.randn(2, 3, 32, 32)
    outputs, kinds = [], set()
    for form in ("eager", "sdpa"):
        model = hf.SamVisionModel._from_config(config, attn_implementation=form).eval()
        model.load_state_dict(state)
        for name, site in elastic_sites_in(model)[0].items():
            kinds.add(type(site.stock).__name__)
            model.set_submodule(name, small_module(site, site.full_width // 2))
        outputs.append(model(images).last_hidden_state)
    assert {"SamVisionAttention", "SamVisionSdpaAttention"} <= kinds
    torch.testing.assert_close(*outputs, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("name", NAMES)
def test_what_stays_uncut_has_a_reason(name):
    """Where a stage of SAM 2 begins; and what has lost a part of v already."""
    model = make(CLASSES[name])
    uncut = elastic_sites_in(model)[1]
    assert len(uncut) == (3 if name == "Sam2VisionModel" else 0)
    assert all("where a stage begins" in reason for reason in uncut.values())
    for key, site in elastic_sites_in(model)[0].items():
        if isinstance(site, TheirMap) and not site.tied:
            model.set_submodule(key, small_module(site, 4))
    again, uncut = elastic_sites_in(model)
    if name != "Sam2VisionModel":
        assert not any(isinstance(site, TheirMap) for site in again.values())
        assert all("full model" in reason for reason in uncut.values())
