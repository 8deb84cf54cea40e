"""A module of width 0 costs nothing in a small model: no norm is run, no zeros are added; the output stays the same."""

import copy
import io
from collections import Counter

import architectures
import pytest
import torch
from helpers import make_images, make_net
from timm.layers import DropPath
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import stratavit
from stratavit import SuperNet
from stratavit.elastic.merging import MergingBlock
from stratavit.elastic.plain import Constant
from stratavit.elastic.short_blocks import ShortBlock
from stratavit.models import architecture

IMAGES = make_images(3, seed=5)
FAMILIES = ("plain", "layer_scale", "no_bias", "registers")
GONE = {"attn": ("attn",), "mlp": ("mlp",), "both": ("attn", "mlp")}


class Operations(TorchDispatchMode):
    """Counts what torch runs, but for views."""

    def __init__(self):
        super().__init__()
        self.names = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if not function.is_view:
            self.names[function.overloadpacket.__name__] += 1
        return function(*args, **(kwargs or {}))


def operations(block, tokens):
    with torch.no_grad(), Operations() as found:
        block(tokens)
    return found.names


def cut(family, leaves, method="default"):
    net = make_net(family, method)
    spec = {f"blocks.1.{leaf}": 0 for leaf in leaves}
    return net, spec, net.extract(spec=spec, verbose=False)


def as_before(small):
    """The same parts in timm's blocks, with constants that are added as vectors of zeros plus a bias."""
    plain = copy.deepcopy(small)
    for number, block in enumerate(plain.blocks):
        if isinstance(block, ShortBlock):
            stock, ours = object.__new__(block.stock), ("attends", "feeds", "has_factors")
            vars(stock).update({key: value for key, value in vars(block).items() if key not in ours})
            plain.blocks[number] = stock
    return plain


@pytest.mark.parametrize("leaves", GONE.values(), ids=GONE)
@pytest.mark.parametrize("family", FAMILIES)
def test_no_norm_is_run_and_no_zeros_are_added(family, leaves):
    _, _, small = cut(family, leaves)
    tokens, block = torch.randn(2, 5, 32), small.blocks[1]
    found, whole = operations(block, tokens), operations(small.blocks[0], tokens)
    assert found["native_layer_norm"] == 2 - len(leaves)
    assert whole["native_layer_norm"] == 2
    assert not {name for name in found if "zero" in name or "new_" in name}
    assert found["add"] <= whole["add"]
    assert operations(as_before(small).blocks[1], tokens)["native_layer_norm"] == 2


def test_an_mlp_that_is_gone_adds_nothing_of_its_own():
    _, _, small = cut("plain", ("mlp",))
    assert small.blocks[1].mlp.bias is None  # it is in the bias of attention
    assert operations(small.blocks[1], torch.randn(2, 5, 32))["add"] == 1


def test_a_block_that_is_gone_is_one_addition_of_a_vector_or_nothing():
    tokens = torch.randn(2, 5, 32)
    assert operations(cut("plain", ("attn", "mlp"))[2].blocks[1], tokens) == {"add": 1}
    assert operations(cut("plain", ("attn", "mlp"), "paper")[2].blocks[1], tokens) == {}


@pytest.mark.parametrize("leaves", GONE.values(), ids=GONE)
@pytest.mark.parametrize("family", FAMILIES)
def test_the_output_is_that_of_the_elastic_network_and_of_timms_blocks(family, leaves):
    net, spec, small = cut(family, leaves)
    with torch.no_grad():
        found, elastic = small(IMAGES), net(IMAGES, spec)
        assert torch.allclose(found, elastic, rtol=0, atol=1e-5 * float(elastic.abs().max()))
        assert torch.equal(found, as_before(small)(IMAGES))
    assert sum(p.numel() for p in small.parameters()) == net.params(spec)
    assert small.state_dict().keys() == as_before(small).state_dict().keys()


@pytest.mark.parametrize("leaves", GONE.values(), ids=GONE)
def test_drop_path_and_dropout_are_drawn_as_in_timms_blocks(leaves):
    _, _, small = cut("layer_scale", leaves)
    for block in small.blocks:
        block.drop_path1, block.drop_path2 = DropPath(0.5), DropPath(0.5)
    outputs = []
    for model in (small.train(), as_before(small).train()):
        torch.manual_seed(0)
        outputs.append(model(IMAGES))
    assert torch.equal(*outputs)
    assert not torch.equal(outputs[0], small.eval()(IMAGES))


@pytest.mark.parametrize("name", ["eva02_tiny_patch14_224", "vit_small_patch16_dinov3", "beit_base_patch16_224"])
@pytest.mark.parametrize("leaves", GONE.values(), ids=GONE)
def test_rotary_and_beit_blocks(name, leaves):
    net = SuperNet(architectures.make(name)).contract([IMAGES]).eval()
    spec = {site.name: 0 for site in net.sites if site.name.startswith("blocks.1.") and site.name[9:] in leaves}
    small = net.extract(spec=spec, verbose=False)
    calls = []
    for norm in (small.blocks[1].norm1, small.blocks[1].norm2):
        norm.register_forward_hook(lambda *_: calls.append(1))
    with torch.no_grad():
        found, elastic = small(IMAGES), net(IMAGES, spec)
    assert torch.allclose(found, elastic, rtol=0, atol=1e-5 * float(elastic.abs().max()))
    assert len(calls) == 2 - len(spec)
    assert net.params(spec) == sum(p.numel() for p in small.parameters())


def test_files_pickles_and_another_cut(tmp_path):
    _, _, small = cut("plain", ("mlp",))
    stratavit.save(small, tmp_path / "small")
    read = stratavit.load(tmp_path / "small")
    file = io.BytesIO()
    torch.save(small, file)
    file.seek(0)
    pickled = torch.load(file, weights_only=False)
    again = SuperNet(small)
    none = {site.name: 0 for site in again.sites}
    with torch.no_grad():
        expected = small(IMAGES)
        for model in (read, pickled):
            assert isinstance(model.blocks[1], ShortBlock)
            assert torch.equal(model(IMAGES), expected)
        assert torch.allclose(again(IMAGES), expected, atol=1e-5)
        assert torch.allclose(again.extract(spec=none, verbose=False)(IMAGES), again(IMAGES, none), atol=1e-5)


def test_models_pickled_with_timms_blocks_can_still_be_described():
    _, _, small = cut("plain", ("attn",))
    assert architecture.describe(as_before(small)) == architecture.describe(small)


def test_blocks_that_merge_tokens_leave_constants_out_too():
    net = make_net("plain")
    keep = {"blocks.0.tokens": 12}
    for leaf in ("attn", "mlp"):
        spec = {f"blocks.1.{leaf}": 0} | keep
        small = net.extract(spec=spec, verbose=False)
        assert isinstance(small.blocks[1], MergingBlock)
        assert any(isinstance(part, Constant) for part in (small.blocks[1].attn, small.blocks[1].mlp))
        calls = []
        norms = [module for name, module in small.blocks[1].named_children() if isinstance(module, nn.LayerNorm)]
        for norm in norms:
            norm.register_forward_hook(lambda *_, calls=calls: calls.append(1))
        with torch.no_grad():
            found, elastic = small(IMAGES), net(IMAGES, spec)
        assert len(norms) == 2
        assert len(calls) == 1
        assert torch.allclose(found, elastic, rtol=0, atol=1e-5 * float(elastic.abs().max()))
