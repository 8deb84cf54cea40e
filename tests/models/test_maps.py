"""Models that return all their tokens: maps, intermediate ones too, of the extracted are those of the elastic."""

import copy

import architectures
import pytest
import timm
import torch
from helpers import PLAN, keyed, make_batches, make_images, make_net, relative_error
from timm.models._features import FeatureGetterNet

import stratavit
from stratavit import StrataViTError, SuperNet
from stratavit.calibration.dense_outputs import DenseOutputs
from stratavit.calibration.objectives import distance, relative_errors
from stratavit.dropout_list.marginal_effects import Reference
from stratavit.dropout_list.sensitivity import bypass_sensitivity
from stratavit.interop.exported_model import exported_model
from stratavit.models.families.base import mean_token
from stratavit.models.final_mean import FinalMean

NAMES = [name for name in architectures.NAMES if name.endswith(".maps")]
IMAGES = make_images(4, seed=9)
every_model = pytest.mark.parametrize("name", NAMES)


def converted(name):
    """With a list and a final mean."""
    return SuperNet(architectures.make(name)).contract(make_batches()).stratify(make_batches(), plan=PLAN).eval()


@every_model
def test_intermediate_maps_of_the_extracted_are_those_of_the_elastic(name):
    """With timm's own readers, as detectors and segmenters call them."""
    net = converted(name)
    spec = net.spec(macs=0.7)
    small = net.extract(spec=spec)
    assert small.feature_info == net.model.feature_info
    last = 1  # block, or stage of Swin
    readers = {
        "features": lambda model: [model.forward_features(IMAGES)],
        "intermediates": lambda model: model.forward_intermediates(IMAGES, indices=[0, last])[1],
        "normed": lambda model: model.forward_intermediates(IMAGES, [last], norm=True, intermediates_only=True),
        "final": lambda model: [model.forward_intermediates(IMAGES, indices=[0])[0]],
    }
    if hasattr(small, "get_intermediate_layers"):
        readers["layers"] = lambda model: model.get_intermediate_layers(IMAGES, n=[0, last], norm=True)
    with torch.no_grad():
        for reader in readers.values():
            with net.at(spec) as model:
                elastic = reader(model)
            for ours, theirs in zip(reader(small), elastic, strict=True):
                assert relative_error(ours, theirs) < 1e-5
        assert torch.equal(small.forward_features(IMAGES), small(IMAGES))


@every_model
def test_features_only_backbones_are_cut_in_place(name):
    """timm's wrapper around a backbone runs the small model that takes the place of its model."""
    net = converted(name)
    small = net.extract(macs=0.7)
    backbone = FeatureGetterNet(copy.deepcopy(net.source_copy()), out_indices=[0, 1])
    backbone.model = small
    with torch.no_grad():
        expected = small.forward_intermediates(IMAGES, indices=[0, 1], intermediates_only=True)
        for ours, theirs in zip(backbone(IMAGES), expected, strict=True):
            assert torch.equal(ours, theirs)


@pytest.mark.parametrize("name", [name for name in NAMES if "swin" not in name and "beit" not in name])
def test_merged_tokens_are_put_back_in_maps(name, tmp_path):
    """The joint list is made on maps of all patches; small networks return as many tokens as the source."""
    net = SuperNet(architectures.make(name)).contract(make_batches()).eval()
    net.stratify(make_batches(), plan=PLAN, axes=("width", "tokens"))
    met = net.budget(macs=0.55, axes="both")
    assert any(key.endswith(".tokens") for key in met.spec)
    small = net.extract(spec=met.spec)
    with torch.no_grad():
        full, ours = net(IMAGES), small(IMAGES)
        assert ours.shape == full.shape
        assert relative_error(ours, net(IMAGES, met.spec)) < 1e-5
    assert stratavit.export(small, tmp_path / "small.onnx", images=IMAGES).difference < 1e-4


@pytest.mark.parametrize("name", ["vit_small_patch14_reg4_dinov2.maps", "swin_tiny_patch4_window7_224.maps"])
def test_the_final_mean_is_that_of_all_tokens(name):
    """Put into the bias of the last norm, it makes the mean of all tokens that of the dense model."""
    net = SuperNet(architectures.make(name)).contract(make_batches()).eval()
    spec = {site.name: site.width // 2 for site in net.sites}
    drift = Reference(net.model, net.sites, [keyed(IMAGES)], DenseOutputs()).measure(spec).drift
    net.final_mean = FinalMean((net.macs(spec) / net.macs(),), drift[None].float())
    for small in (net.extract(spec=spec), lambda images: net(images, spec)):
        with torch.no_grad():
            mean = (small(IMAGES) - net(IMAGES)).flatten(0, -2).mean(dim=0)
        assert mean.norm() < 1e-4 < 0.01 * drift.norm()


def test_calibration_by_maps_is_not_that_by_the_class_token():
    """The same weights, pooled or not: the list depends on what is returned."""
    pooled = architectures.make("vit_small_patch14_reg4_dinov2")
    maps = copy.deepcopy(pooled)
    maps.reset_classifier(0, "")
    errors = []
    for model in (pooled, maps):
        net = SuperNet(model).contract(make_batches()).stratify(make_batches(), plan=PLAN)
        net.model.reset_classifier(0, "")
        with torch.no_grad():
            errors.append(float(distance(net(IMAGES, net.spec(macs=0.5)), maps(IMAGES), 0)))
    assert errors[1] < errors[0]


def test_relative_errors_of_maps_are_of_an_image():
    """Squared distance over squared length, both summed over tokens: a token counts by its length."""
    dense = torch.tensor([[[3.0, 0.0], [0.0, 1.0]], [[1.0, 0.0], [1.0, 0.0]]])
    small = dense.clone()
    small[0, 1, 1] = 3.0
    assert relative_errors(small, dense).tolist() == pytest.approx([0.4, 0])
    assert torch.equal(relative_errors(small[:, None], dense[:, None]), relative_errors(small, dense))
    assert mean_token(dense).tolist() == [[1.5, 0.5], [1, 0]]
    assert torch.equal(mean_token(dense[:, None]), mean_token(dense))


def test_sensitivity_is_how_far_maps_move():
    net, batches = SuperNet(architectures.make("swin_tiny_patch4_window7_224.maps")), make_batches()
    gamma = bypass_sensitivity(net.model, net.sites, batches)
    images = torch.cat([images for images, _ in batches])
    with torch.no_grad():
        full, module = net(images), net.elastic[net.sites[1].name]
        module.bypassed = True
        moved = net.model(images)
        module.bypassed = False
    expected = ((moved - full).square().sum((1, 2, 3)) / full.square().sum((1, 2, 3))).mean()
    assert gamma[net.sites[1].name] == pytest.approx(float(expected), rel=1e-4)


def test_maps_that_are_kept_hold_no_more_memory_than_they_say():
    """A batch of which one map finds room is not held as a whole."""
    known = DenseOutputs(limit=4 * (17 * 32 + 32))
    maps, features = torch.randn(8, 17, 32), torch.randn(8, 32)
    known.add([bytes([number]) for number in range(8)], maps, features)
    (kept,) = known._known.values()
    assert sum(part.untyped_storage().nbytes() for part in kept) == 4 * (17 * 32 + 32)


def test_pooling_may_be_taken_away_later_but_not_with_a_head():
    for name in ("vit_small_patch14_reg4_dinov2", "eva02_tiny_patch14_224", "swin_tiny_patch4_window7_224"):
        model = architectures.make(name)
        net = SuperNet(model)
        for one in (net.model, model):
            one.reset_classifier(0, "")
        assert SuperNet(model).macs() == net.macs()  # EVA's norm stays behind the pooling that is gone
        with torch.no_grad():
            assert relative_error(net.extract(spec={})(IMAGES), model(IMAGES)) < 1e-6
    net = copy.deepcopy(make_net("plain"))
    net.model.reset_classifier(7, "")
    with pytest.raises(StrataViTError, match="num_classes=0"):
        net.macs()


def test_exported_files_say_that_they_return_maps(tmp_path):
    small = SuperNet(architectures.make("vit_small_patch14_reg4_dinov2.maps")).extract(spec={})
    stratavit.export(small, tmp_path / "small.onnx", images=IMAGES, half=True)
    file = exported_model(tmp_path / "small.onnx")
    assert (file.num_classes, file.num_prefix_tokens) == (0, 5)
    labelled = [(IMAGES, torch.arange(4))]
    assert stratavit.knn(file, labelled, labelled, k=1).top1 == 100


def test_networks_that_return_maps_recover():
    """A few steps towards the source bring the maps nearer to its own."""
    pytest.importorskip("accelerate")
    net, images = SuperNet(architectures.make("swin_tiny_patch4_window7_224.maps")), make_images(24, seed=3)
    small = net.extract(spec={site.name: site.width // 2 for site in net.sites})
    recipe = {"batch_size": 8, "workers": 0, "tracker": "none", "lr": 1e-3}
    stratavit.recover(small, [images], teacher=net, steps=8, config=recipe, cpu=True)
    facts = small.provenance["recover"]
    assert facts["divergence"] < facts["before"]["divergence"]
    assert 0 < facts["before"]["agreement"] < 100


def test_timm_loads_maps(tmp_path):
    small = SuperNet(architectures.make("vit_small_patch14_reg4_dinov2.maps")).extract(spec={"blocks.0.tokens": 9})
    stratavit.save(small, tmp_path / "small")
    loaded = timm.create_model(f"local-dir:{tmp_path / 'small'}", pretrained=True).eval()
    with torch.no_grad():
        assert torch.equal(loaded(IMAGES), small(IMAGES))
