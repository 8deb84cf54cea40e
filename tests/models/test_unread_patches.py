"""Patches that nobody reads behind the last block: a model that pools its class token drops them without any effect."""

import copy

import architectures
import pytest
import torch
from helpers import PLAN, make_batches, make_images, make_net, relative_error

import stratavit
from stratavit import ArtifactError, StrataViTError, SuperNet
from stratavit.dropout_list.strata import Entry
from stratavit.models.cost import linear_macs
from stratavit.models.families import reads_patches

DROP = {"blocks.1.tokens": 0}
READERS = [name for name in architectures.NAMES if not reads_patches(architectures.make(name))]
UNREAD = [name for name in READERS if SuperNet(architectures.make(name)).cost.places]


def test_the_list_of_models():
    assert {"vit_tiny_patch16_224", "deit_tiny_distilled_patch16_224"} <= {*UNREAD}
    assert not any(name.endswith(".maps") or "siglip" in name or "avg" in name for name in UNREAD)


@pytest.mark.parametrize("name", UNREAD)
def test_dropping_them_changes_nothing(name, tmp_path):
    model, images = architectures.make(name), make_images(4, seed=9)
    net = SuperNet(model).eval()
    small = net.extract(spec=DROP, verbose=False)
    with torch.no_grad():
        assert relative_error(net(images, DROP), model(images)) < 1e-6
        assert relative_error(small(images), net(images, DROP)) < 1e-6
        both = {**DROP, "blocks.0.tokens": 9, "blocks.1.mlp": 4}
        assert relative_error(net(images, both), net(images, {**both, "blocks.1.tokens": 9})) < 1e-6
    size = net.data_config["input_size"]
    for attention in (False, True):
        assert linear_macs(small, size, attention=attention) == net.macs(DROP, attention=attention) < net.macs()
    assert net.params(DROP) == net.params()
    stratavit.save(small, tmp_path / "small")
    with torch.no_grad():
        assert torch.equal(stratavit.load(tmp_path / "small")(images), small(images))


@pytest.mark.parametrize("name", [name for name in architectures.NAMES if name not in READERS][:40])
def test_models_that_read_patches_cannot_drop_them(name):
    with pytest.raises(StrataViTError, match=r"blocks\.1\.tokens"):
        SuperNet(architectures.make(name)).macs(DROP)


def test_only_the_last_block_can():
    with pytest.raises(StrataViTError, match=r"blocks\.0\.tokens"):
        make_net("plain").macs({"blocks.0.tokens": 0})


def test_the_list_drops_them_first():
    net = copy.deepcopy(make_net("plain")).stratify(make_batches(), plan=PLAN, axes=("width", "tokens"))
    first = net.joint_strata.entries[0]
    assert (first.site, first.width) == ("blocks.1.tokens", 0)
    assert all(widths["blocks.1.tokens"] == 0 for _, widths in net.provenance["stratify"]["both_axes"]["states"])
    kept = net.stratify(make_batches(), plan=PLAN, axes=("width", "tokens"), ignore=["blocks.1.tokens"])
    assert "blocks.1.tokens" not in {entry.site for entry in kept.joint_strata.entries}


def test_a_change_of_pooling_is_refused_while_the_list_drops_them():
    net = copy.deepcopy(make_net("plain")).stratify(make_batches(), plan=PLAN, axes=("width", "tokens"))
    net.model.reset_classifier(5)
    assert net.macs(DROP) < net.macs()
    net.model.reset_classifier(5, global_pool="avg")
    with pytest.raises(ArtifactError, match="joint_strata"):
        net.macs()
    net.joint_strata = None
    with pytest.raises(StrataViTError, match=r"blocks\.1\.tokens"):
        net.macs(DROP)


def test_a_pass_asks_what_is_read_now():
    """Also where nothing asked for costs since the change."""
    net, images = copy.deepcopy(make_net("plain")), make_images(2)
    net.model.reset_classifier(5, global_pool="avg")
    with pytest.raises(StrataViTError, match=r"blocks\.1\.tokens"):
        net(images, DROP)
    net.model.reset_classifier(5, global_pool="token")
    with torch.no_grad():
        assert relative_error(net(images, DROP), net(images)) < 1e-6


def test_a_small_model_that_drops_them_is_told_so(tmp_path):
    small = make_net("plain").extract(spec=DROP, verbose=False)
    small.reset_classifier(5, global_pool="avg")
    with pytest.raises(ArtifactError, match=r"drops; pool the class token again"):
        stratavit.save(small, tmp_path / "small")


def test_a_list_may_drop_them_and_merge_nothing():
    ignored = ["blocks.0.tokens"]
    net = copy.deepcopy(make_net("plain")).stratify(make_batches(), plan=PLAN, axes=("width", "tokens"), ignore=ignored)
    assert [entry for entry in net.joint_strata.entries if entry.site.endswith(".tokens")] == [
        Entry("blocks.1.tokens", 0, 0)
    ]
    assert net.provenance["stratify"]["both_axes"]["states"]
