"""Heads that their owner has replaced are what they are, whatever ``num_classes`` says; frozen weights stay frozen."""

import json

import architectures
import pytest
import torch
from helpers import make_batches, make_images, make_model, relative_error
from timm.layers import ClassifierHead
from torch import nn

import stratavit
from stratavit import ArtifactError, StrataViTError, SuperNet, UnsupportedModelError
from stratavit.models.cost import linear_macs
from stratavit.models.freezing import frozen_names
from stratavit.utils.model import classes_of

VIT, SWIN = "vit_tiny_patch16_224", "swin_tiny_patch4_window7_224"
IMAGES = make_images(2)
HEADS = {  # what is put there -> classes, dropout
    "Linear of 5": (lambda dim: nn.Linear(dim, 5), 5, 0.0),
    "Dropout, Linear": (lambda dim: nn.Sequential(nn.Dropout(0.25), nn.Linear(dim, 7)), 7, 0.25),
    "a row in a row": (
        lambda dim: nn.Sequential(nn.Dropout(0.5), nn.Sequential(nn.Dropout(0.5), nn.Identity(), nn.Linear(dim, 3))),
        3,
        0.75,
    ),
    "Identity": (lambda dim: nn.Identity(), 0, 0.0),
}
OTHERS = {
    "other width": lambda dim: nn.Linear(dim + 1, 5),
    "no bias": lambda dim: nn.Linear(dim, 5, bias=False),
    "MLP": lambda dim: nn.Sequential(nn.Linear(dim, 8), nn.ReLU(), nn.Linear(8, 5)),
    "dropout behind": lambda dim: nn.Sequential(nn.Linear(dim, 5), nn.Dropout(0.1)),
    "another class": lambda dim: type("Head", (nn.Linear,), {})(dim, 5),
}


def put(model, head):
    """At the place where the model has its head."""
    owner, leaf = (model.head, "fc") if isinstance(model.head, ClassifierHead) else (model, "head")
    setattr(owner, leaf, head(model.num_features))
    return model.eval()


def dropout_of(model):
    return (model.head.drop if isinstance(model.head, ClassifierHead) else model.head_drop).p


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("name", [VIT, "vit_base_patch16_clip_224", "eva02_tiny_patch14_224", SWIN])
def test_the_layer_tells_the_classes(name, head, tmp_path):
    layer, classes, rate = HEADS[head]
    model = put(architectures.make(name), layer)
    before = str(model.head)
    net = SuperNet(model).eval()
    assert classes_of(model) == classes
    assert (net.model.num_classes, dropout_of(net.model)) == (classes, rate)
    assert net.params() == sum(p.numel() for p in model.parameters())
    assert net.macs() == linear_macs(model, (3, 32, 32))
    small = put(net.extract(spec={net.sites[0].name: 8}, verbose=False), layer)
    net.save(tmp_path / "net")
    stratavit.save(model, tmp_path / "dense")
    stratavit.save(small, tmp_path / "small")
    assert str(model.head) == before  # the source's does not change
    with torch.no_grad():
        for found in (net, SuperNet.load(tmp_path / "net").eval(), stratavit.load(tmp_path / "dense")):
            assert relative_error(found(IMAGES), model(IMAGES)) < 1e-5
            assert classes_of(found) == classes
        assert relative_error(stratavit.load(tmp_path / "small")(IMAGES), small(IMAGES)) < 1e-5


@pytest.mark.parametrize("head", OTHERS)
@pytest.mark.parametrize("name", [VIT, SWIN])
def test_other_heads_are_refused_with_a_way_out(name, head, tmp_path):
    model = put(architectures.make(name), OTHERS[head])
    for use in (SuperNet, lambda model: stratavit.save(model, tmp_path / "x")):
        with pytest.raises(StrataViTError, match="reset_classifier"):
            use(model)
    assert not (tmp_path / "x").exists()


def test_a_swin_without_its_pooling_is_refused():
    model = architectures.make(SWIN)
    model.head = nn.Linear(model.num_features, 5)
    with pytest.raises(UnsupportedModelError, match=r"head\.fc"):
        SuperNet(model)


def test_two_heads():
    model = make_model("distilled")
    model.head = nn.Sequential(nn.Dropout(0.1), nn.Linear(32, 4))
    with pytest.raises(UnsupportedModelError, match="head_dist"):
        SuperNet(model)
    model.head_dist = nn.Sequential(nn.Dropout(0.1), nn.Linear(32, 4))
    net = SuperNet(model.eval()).eval()
    assert (net.model.num_classes, net.model.head_drop.p) == (4, pytest.approx(0.1))
    with torch.no_grad():
        assert relative_error(net(IMAGES), model(IMAGES)) < 1e-5


def test_dropout_comes_on_top_of_the_models_own():
    model = make_model("plain")
    model.head_drop = nn.Dropout(0.5)
    assert SuperNet(put(model, HEADS["Dropout, Linear"][0])).model.head_drop.p == 0.625


def test_measuring_goes_by_the_layer():
    with pytest.raises(StrataViTError, match="features"):
        stratavit.evaluate(put(make_model("plain"), HEADS["Identity"][0]), make_batches())
    bare = make_model("plain")
    bare.reset_classifier(0)
    assert stratavit.evaluate(put(bare, lambda dim: nn.Linear(dim, 7)), make_batches()).n == 12
    assert classes_of(put(make_model("plain"), OTHERS["MLP"])) == 7  # as `num_classes` says
    assert classes_of(nn.Linear(2, 3)) == 2  # it has none of timm's attributes


def test_a_single_output_is_a_feature():
    """One output has no cross-entropy to differentiate; channels are sorted by its square all the same."""
    model = architectures.make(VIT, num_classes=1)
    assert classes_of(model) == 0
    net = SuperNet(model).contract([IMAGES]).eval()
    before, after = model.blocks[0].attn.qkv.weight, net.model.blocks[0].attn.qkv.weight
    with torch.no_grad():
        assert relative_error(after.abs().sort().values, before.abs().sort().values) > 1e-3
        assert relative_error(net(IMAGES), model(IMAGES)) < 2e-5


def test_a_classifier_of_transformers():
    model = architectures.make("ViTForImageClassification")
    model.classifier = nn.Linear(32, 4)
    assert SuperNet(model).extract(spec={"blocks.0.attn": 8}, verbose=False).config.num_labels == 4


@pytest.mark.parametrize("head", HEADS)
def test_a_classifier_of_torchvision(head):
    model = architectures.make(architectures.TORCHVISION)
    model.heads = HEADS[head][0](32)
    with torch.no_grad():
        assert relative_error(stratavit.as_timm(model.eval())(IMAGES), model(IMAGES)) < 1e-5


@pytest.mark.parametrize("part", ["heads", "activation"])
def test_what_timm_has_no_counterpart_of_is_refused(part):
    model = architectures.make(architectures.TORCHVISION)
    if part == "heads":
        model.heads = OTHERS["MLP"](32)
    else:
        model.encoder.layers[0].mlp[1] = nn.ReLU()
    with pytest.raises(StrataViTError):
        stratavit.as_timm(model)


# ---- frozen weights -------------------------------------------------------------------------------------------------


def part_frozen(model):
    """All but the head and the last block's MLP; of attention q, k and v alone learn in the first block."""
    model.requires_grad_(False)
    blocks = [module for module in model.modules() if hasattr(module, "attn") and hasattr(module, "mlp")]
    blocks[-1].mlp.requires_grad_(True)
    for name, parameter in blocks[0].attn.named_parameters():
        parameter.requires_grad_(not name.startswith("proj"))
    model.head.requires_grad_(True)
    return model


@pytest.mark.parametrize("width", [8, 0])
@pytest.mark.parametrize("name", [name for name in architectures.KINDS if "siglip" not in name])
def test_frozen_weights_stay_frozen(name, width, tmp_path):
    model = part_frozen(architectures.make(name))
    net = SuperNet(model).contract([torch.randn(4, 3, 32, 32)])
    assert frozen_names(net.model) == frozen_names(model)
    first, last = (next(s.name for s in order if s.kind == "attention") for order in (net.sites, net.sites[::-1]))
    mlp = next(s.name for s in reversed(net.sites) if s.kind == "mlp")
    small = net.extract(spec={first: width, last: width, mlp: width}, verbose=False)
    uncut = ("q_bias", "v_bias", "relative_position_bias_table", "logit_scale", "rel_pos_h", "rel_pos_w")
    for key, parameter in small.named_parameters():
        where, _, leaf = key.rpartition(".")
        head_or_mlp = key.startswith(("head", mlp))
        inner = where.startswith(f"{first}.") and not where.endswith("proj")
        assert parameter.requires_grad == (head_or_mlp or inner or (where == first and leaf in uncut)), key
    net.save(tmp_path / "net")
    stratavit.save(small, tmp_path / "small")
    assert frozen_names(SuperNet.load(tmp_path / "net").model) == frozen_names(model)
    assert frozen_names(stratavit.load(tmp_path / "small")) == frozen_names(small)


def test_serving_freezes_no_small_model():
    net = SuperNet(part_frozen(make_model("plain"))).contract(make_batches())
    expected = frozen_names(net.extract(spec={"blocks.0.attn": 8}, verbose=False))
    net.specialise({"blocks.0.attn": 8})
    assert frozen_names(net.extract(spec={"blocks.0.attn": 8}, verbose=False)) == expected


def test_folders_without_the_list_and_with_a_wrong_one(tmp_path):
    stratavit.save(make_model("plain").requires_grad_(False), tmp_path / "small")
    path = tmp_path / "small" / "stratavit.json"
    content = json.loads(path.read_text())
    del content["hashes"]
    for wrong in (["nothing"], "head.weight", [3]):
        path.write_text(json.dumps(content | {"frozen": wrong}))
        with pytest.raises(ArtifactError, match="frozen"):
            stratavit.load(tmp_path / "small")
    del content["frozen"]
    path.write_text(json.dumps(content))
    assert frozen_names(stratavit.load(tmp_path / "small")) == []


@pytest.mark.parametrize("name", [*architectures.TRANSFORMERS, architectures.TORCHVISION])
def test_frozen_weights_of_other_libraries(name):
    model = architectures.make(name)
    for number, parameter in enumerate(model.parameters()):
        parameter.requires_grad_(number % 2 == 0)
    net = SuperNet(model)
    assert 0 < len(frozen_names(net.model)) < len(list(net.model.parameters()))
    again = SuperNet(net.extract(spec={}, verbose=False))
    assert frozen_names(again.model) == frozen_names(net.model)
