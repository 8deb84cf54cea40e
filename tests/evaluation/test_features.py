"""Models that answer with features: nearest neighbours, text embeddings, objectives, and what is refused."""

from __future__ import annotations

import copy

import pytest
import timm
import torch
from helpers import PLAN, enliven, make_batches, make_images
from PIL import Image
from safetensors.torch import save_file

import stratavit
from stratavit import ArtifactError, StrataViTError, SuperNet
from stratavit.cli.parser import main
from stratavit.dropout_list.sensitivity import bypass_sensitivity
from stratavit.evaluation.features import features, knn, read_embeddings, zero_shot

SIZES = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}


def headless():
    return enliven(timm.create_model("vit_small_patch14_dinov2", **SIZES, num_classes=0)).eval()


def clip():
    return enliven(timm.create_model("vit_base_patch16_clip_224", **SIZES, num_classes=12)).eval()


class Known(torch.nn.Module):
    """Its features are the first pixels of the image."""

    num_classes = 0

    def __init__(self, width):
        super().__init__()
        self.width, self.weight = width, torch.nn.Parameter(torch.zeros(1))

    def forward(self, images):
        return images.flatten(1)[:, : self.width]


def pictures(rows):
    """Images whose first pixels are the rows."""
    images = torch.zeros(len(rows), 3, 4, 4)
    images.view(len(rows), -1)[:, : len(rows[0])] = torch.tensor(rows)
    return images


def test_neighbours_solved_by_hand():
    bank = [(pictures([[1.0, 0.0], [0.9, 0.1], [0.0, 1.0]]), torch.tensor([0, 0, 1]))]
    queries = [(pictures([[2.0, 0.1], [0.1, 3.0], [1.0, 0.9]]), torch.tensor([0, 1, 1]))]
    assert knn(Known(2), bank, queries, k=1).top1 == pytest.approx(100 * 2 / 3)  # the third is nearer to class 0
    found = knn(Known(2), bank, queries, k=3, temperature=1e9)  # all vote alike: class 0 has two of three
    assert found.top1 == pytest.approx(100 / 3)
    assert found.n == 3


def test_a_class_that_the_bank_lacks_is_wrong_not_an_error():
    bank = [(pictures([[1.0, 0.0], [0.0, 1.0]]), torch.tensor([0, 1]))]
    found = knn(Known(2), bank, [(pictures([[1.0, 0.0], [1.0, 0.0]]), torch.tensor([0, 5]))], k=1)
    assert found.top1 == 50


def test_text_embeddings_solved_by_hand(tmp_path):
    embeddings = torch.tensor([[3.0, 0.0], [0.0, 0.5]])
    images = [(pictures([[1.0, 0.2], [0.2, 1.0], [1.0, 0.9]]), torch.tensor([0, 1, 1]))]
    found = zero_shot(Known(2), embeddings, images)
    assert found.top1 == pytest.approx(100 * 2 / 3)
    save_file({"text": embeddings}, tmp_path / "text.safetensors")
    assert torch.equal(read_embeddings(tmp_path / "text.safetensors"), embeddings)
    with pytest.raises(StrataViTError, match="have 3 numbers each, the image features 2"):
        zero_shot(Known(2), torch.ones(2, 3), images)


@pytest.mark.parametrize(
    "tensors", [{"a": torch.ones(2, 2), "b": torch.ones(1)}, {"a": torch.ones(3)}, {"a": torch.full((2, 2), torch.nan)}]
)
def test_bad_embeddings_are_refused(tensors, tmp_path):
    save_file(tensors, tmp_path / "text.safetensors")
    with pytest.raises(ArtifactError, match="should hold one tensor"):
        read_embeddings(tmp_path / "text.safetensors")
    with pytest.raises(ArtifactError, match="is not a file"):
        read_embeddings(tmp_path / "absent.safetensors")


def test_features_of_a_sub_network_are_those_of_the_extracted():
    net = SuperNet(headless()).contract(make_batches()).stratify(make_batches(), plan=PLAN)
    spec, images = net.spec(macs=0.6), make_images(4)
    with torch.no_grad(), net.at(spec) as inner:
        assert torch.allclose(features(inner, images), features(net.extract(spec=spec), images), atol=1e-6)
    labelled = make_batches()
    assert knn(net, labelled, labelled, spec).top1 == knn(net.extract(spec=spec), labelled, labelled).top1


def test_features_of_a_classifier_are_what_its_head_reads():
    model = enliven(timm.create_model("vit_tiny_patch16_224", **SIZES, num_classes=7)).eval()
    with torch.no_grad():
        found, answer = features(model, make_images(2)), model(make_images(2))
    assert found.shape == (2, 32)
    assert answer.shape == (2, 7)


def test_an_embedding_head_is_no_classifier(tmp_path):
    net = SuperNet(clip(), embedding=True).contract(make_batches()).stratify(make_batches(), plan=PLAN)
    with pytest.raises(StrataViTError, match="answers with features"):
        stratavit.evaluate(net, make_batches())
    small = net.extract(macs=0.6)
    images = [(images, labels) for images, labels in make_batches()]
    before = zero_shot(small, torch.eye(12), images)
    stratavit.save(small, tmp_path / "small")
    net.save(tmp_path / "net")
    assert zero_shot(stratavit.load(tmp_path / "small"), torch.eye(12), images) == before
    assert SuperNet.load(tmp_path / "net").embedding


def test_sensitivity_without_a_head_is_the_distance_features_move():
    net = SuperNet(headless())
    batches = make_batches()
    gamma = bypass_sensitivity(net.model, net.sites, batches)
    images = torch.cat([images for images, _ in batches])
    with torch.no_grad():
        full = net(images)
        name = net.sites[1].name
        net.elastic[name].bypassed = True
        moved = net.model(images)
        net.elastic[name].bypassed = False
    expected = ((moved - full).square().sum(-1) / full.square().sum(-1)).mean()
    assert gamma[name] == pytest.approx(float(expected), rel=1e-4)
    with pytest.raises(StrataViTError, match="measure 'top1' needs a head"):
        bypass_sensitivity(net.model, net.sites, batches, "top1")


def test_training_measures_by_neighbours_and_needs_no_labels(tmp_path):
    pytest.importorskip("accelerate")
    net = SuperNet(headless()).contract(make_batches()).stratify(make_batches(), plan=PLAN)
    images = make_images(12)
    data = torch.utils.data.TensorDataset(images, torch.arange(12) % 3)
    recipe = {"epochs": 1, "list_epochs": 1, "batch_size": 4, "mixup": 0.0, "cutmix": 0.0, "repeats": 1, "workers": 0}
    stratavit.train_piad(copy.deepcopy(net), data, data, recipe | {"tracker": "none"}, tmp_path / "run", cpu=True)
    assert (tmp_path / "run" / "curve.csv").exists()
    only = torch.utils.data.TensorDataset(images)
    stratavit.train_piad(copy.deepcopy(net), only, config=recipe | {"tracker": "none"}, cpu=True)


def test_widths_of_q_and_k_may_be_said():
    whole = SuperNet(enliven(timm.create_model("vit_small_patch16_dinov3", **SIZES, num_classes=0)).eval())
    name = whole.sites[0].name
    assert whole.resolve({name: {"qk": 16, "v": 8}}) == whole.resolve({name: 8})
    assert whole.extract(spec={name: {"qk": 16, "v": 8}}).blocks[0].attn.v.out_features == 16
    with pytest.raises(StrataViTError, match="stays whole, 16; asked qk 8 with v 8"):
        whole.resolve({name: {"qk": 8, "v": 8}})
    tied = SuperNet(headless())
    assert tied.resolve({name: {"qk": 8, "v": 8}}) == tied.resolve({name: 8})
    with pytest.raises(StrataViTError, match="is as wide as v; asked qk 16 with v 8"):
        tied.resolve({name: {"qk": 16, "v": 8}})
    with pytest.raises(StrataViTError, match="needs 'qk' and 'v', or one width"):
        tied.resolve({name: {"q": 8}})


def test_an_embedding_is_trained_by_its_source():
    pytest.importorskip("accelerate")
    net = SuperNet(clip(), embedding=True).contract(make_batches()).stratify(make_batches(), plan=PLAN)
    recipe = {"epochs": 1, "list_epochs": 1, "batch_size": 4, "repeats": 1, "workers": 0, "tracker": "none"}
    data = torch.utils.data.TensorDataset(make_images(12))
    before = net.model.blocks[0].mlp.fc1.weight.clone()
    stratavit.train_piad(net, data, config=recipe, cpu=True)
    assert not torch.equal(net.model.blocks[0].mlp.fc1.weight, before)


def test_the_command_trains_without_a_head(tmp_path):
    pytest.importorskip("accelerate")
    SuperNet(headless()).contract(make_batches()).stratify(make_batches(), plan=PLAN).save(tmp_path / "run")
    for split, name in ((split, name) for split in ("train", "val") for name in ("a", "b")):
        folder = tmp_path / "images" / split / name
        folder.mkdir(parents=True)
        for number in range(4):
            Image.new("RGB", (40, 40), (60 * number, 90, 30)).save(folder / f"{number}.png")
    options = "--epochs 1 --list-epochs 1 --batch-size 4 --repeats 1 --workers 0 --tracker none --device cpu"
    paths = [str(tmp_path / name) for name in ("run", "images", "out")]
    assert main(["train", paths[0], "--data", paths[1], "--out", paths[2], *options.split()]) == 0
    assert (tmp_path / "out" / "curve.csv").exists()
