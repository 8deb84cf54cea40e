"""Units that suit a GPU: where they end, and that a list in them keeps budgets, nests and is saved."""

from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from helpers import PLAN, make_batches, make_images
from hypothesis import given
from hypothesis import strategies as st
from timm.models.vision_transformer import VisionTransformer

from stratavit import SuperNet
from stratavit.cli.parser import parsers
from stratavit.dropout_list.build import units_for
from stratavit.elastic.site import Site, gpu_steps, with_units
from stratavit.errors import StrataViTError

CPU, GPU = torch.device("cpu"), torch.device("cuda")
HEADS = {16: (0, 16), 32: (0, 16, 32), 48: (0, 32, 48), 64: (0, 32, 64), 72: (0, 32, 64, 72), 80: (0, 32, 64, 80)}


def site(kind, width):
    return Site("a", kind, width, heads=2, dim=64, in_biases=1, out_bias=True, steps=(0, width), maps=1)


def make_net():
    torch.manual_seed(0)
    size = {"img_size": 32, "patch_size": 8, "embed_dim": 128, "depth": 2, "num_heads": 2, "mlp_ratio": 2.0}
    return SuperNet(VisionTransformer(**size, num_classes=7).eval()).contract(make_batches())


@pytest.mark.parametrize("width", HEADS)
def test_head_widths_end_where_attention_kernels_pad_to(width):
    assert gpu_steps(site("attention", width)) == HEADS[width]


@given(st.integers(1, 9000))
def test_hidden_widths_are_multiples_but_for_the_full_one(width):
    steps = gpu_steps(site("mlp", width))
    unit = 128 if width >= 2048 else 64
    assert (steps[0], steps[-1]) == (0, width)
    assert all(step % unit == 0 for step in steps[:-1])
    assert all(b - a == unit for a, b in pairwise(steps[:-1]))
    assert 0 < steps[-1] - steps[-2] <= unit


def test_only_units_change():
    before = (site("attention", 64), site("mlp", 256))
    assert tuple(replace(one, steps=(0, one.width)) for one in with_units(before, "gpu")) == before
    assert with_units(with_units(before, "gpu"), (8, 32)) == with_units(before, (8, 32))


def test_a_list_in_them_keeps_budgets_and_nests(tmp_path):
    net = make_net().stratify(make_batches(), plan=PLAN, units="gpu")
    assert net.units == "gpu"
    sites = {one.name: one for one in net.sites}
    assert all(entry.width in sites[entry.site].steps for entry in net.strata.entries)
    assert {one.steps for one in net.sites} == {(0, 32, 64), (0, 64, 128, 192, 256)}
    specs = [net.strata.spec(position) for position in range(len(net.strata) + 1)]
    assert all(after[name] <= before[name] for before, after in pairwise(specs) for name in before)
    unit = max(net.macs(before) - net.macs(after) for before, after in pairwise(specs))
    for share in (0.9, 0.7, 0.5, 0.35):
        got = net.macs(net.spec(macs=share))
        assert share * net.macs() - unit <= got <= share * net.macs()
    net.save(tmp_path / "run")
    read = SuperNet.load(tmp_path / "run")
    assert (read.units, read.sites, read.strata.entries) == (net.units, net.sites, net.strata.entries)
    images, spec = make_images(), net.spec(macs=0.5)
    with torch.no_grad():
        torch.testing.assert_close(read.extract(spec=spec, verbose=False)(images), net(images, spec))


def test_units_stay_until_others_are_asked_for():
    net = make_net()
    net.set_units(units="gpu")
    net.stratify(make_batches(), plan=PLAN)
    assert net.units == "gpu"
    assert net.strata is not None
    net.set_units(units="gpu")
    assert net.strata is not None  # nothing has changed
    net.stratify(make_batches(), plan=PLAN, units="default")
    assert net.units == (8, 32)
    assert 8 in {entry.width for entry in net.strata.entries}
    entries = net.strata.entries
    with pytest.raises(StrataViTError, match="units"):
        net.stratify(make_batches(), plan=PLAN, units="tpu")
    assert (net.units, net.strata.entries) == ((8, 32), entries)


def test_latency_on_a_gpu_chooses_them_unless_others_were_set():
    assert units_for((8, 32), None, "latency", GPU) == "gpu"
    assert units_for((8, 32), None, "latency", CPU) == (8, 32)
    assert units_for((8, 32), None, "macs", GPU) == (8, 32)
    assert units_for((16, 12), None, "latency", GPU) == (16, 12)
    assert units_for((8, 32), "default", "latency", GPU) == (8, 32)
    assert units_for((16, 12), "gpu", "macs", CPU) == "gpu"


def test_the_command_has_the_option():
    args = ["convert", "vit_tiny_patch16_224", "--data", "images", "--out", "run"]
    assert parsers()[0].parse_args(args).units is None
    assert parsers()[0].parse_args([*args, "--units", "gpu"]).units == "gpu"
