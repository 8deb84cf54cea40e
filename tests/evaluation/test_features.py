"""Models that output features: nearest neighbours, text embeddings, objectives, and what is refused."""

import pytest
import timm
import torch
from command_line import make_folder
from helpers import CLASSES, PLAN, enliven, make_batches, make_images, make_model
from safetensors.torch import save_file

import stratavit
from stratavit import ArtifactError, StrataViTError, SuperNet
from stratavit.cli.parser import main
from stratavit.dropout_list.sensitivity import bypass_sensitivity
from stratavit.evaluation.features import features, knn, read_embeddings, zero_shot
from stratavit.reports import curve

SIZES = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}


def headless():
    return enliven(timm.create_model("vit_small_patch14_dinov2", **SIZES, num_classes=0)).eval()


def clip():
    return enliven(timm.create_model("vit_base_patch16_clip_224", **SIZES, num_classes=12)).eval()


def converted(model, **options):
    return SuperNet(model, **options).contract(make_batches()).stratify(make_batches(), plan=PLAN)


class Known(torch.nn.Module):
    """Its features are the first two pixels of the image."""

    num_classes = 0

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))

    def forward(self, images):
        return images.flatten(1)[:, :2]


def pictures(rows):
    """Images whose first pixels are the rows."""
    images = torch.zeros(len(rows), 3, 4, 4)
    images.view(len(rows), -1)[:, : len(rows[0])] = torch.tensor(rows)
    return images


def test_neighbours_of_known_features(monkeypatch):
    bank = [(pictures([[1.0, 0.0], [0.9, 0.1], [0.0, 1.0]]), torch.tensor([0, 0, 1]))]
    queries = [(pictures([[2.0, 0.1], [0.1, 3.0], [1.0, 0.9]]), torch.tensor([0, 1, 1]))]
    for chunk in (4096, 2):  # images of the bank compared at once
        monkeypatch.setattr("stratavit.evaluation.features.CHUNK", chunk)
        assert knn(Known(), bank, queries, k=1).top1 == pytest.approx(100 * 2 / 3)  # the third is nearer to class 0
        found = knn(Known(), bank, queries, k=3, temperature=1e9)  # all vote alike: class 0 has two of three
        assert (found.top1, found.n) == (pytest.approx(100 / 3), 3)
    lacking = [(pictures([[1.0, 0.0], [1.0, 0.0]]), torch.tensor([0, 5]))]
    assert knn(Known(), bank, lacking, k=1).top1 == 50  # a class that the bank lacks is wrong, not an error


@pytest.mark.parametrize(
    ("bank", "k", "message"),
    [
        (make_batches(), 0, "knn: .*k of at least 1.* 0 and"),
        ([], 1, "knn: .*bank has no images"),
        ([(make_images(2), torch.tensor([0, -1]))], 1, "knn: .*bank has the label -1"),
        ([make_images(2)], 1, "bank: .*no labels"),
    ],
)
def test_neighbours_of_nothing(bank, k, message):
    with pytest.raises(StrataViTError, match=message):
        knn(make_model("plain"), bank, make_batches(), k=k)


def test_text_embeddings_of_known_features(tmp_path):
    embeddings = torch.tensor([[3.0, 0.0], [0.0, 0.5]])
    save_file({"text": embeddings}, tmp_path / "text.safetensors")
    assert torch.equal(read_embeddings(tmp_path / "text.safetensors"), embeddings)
    images = [(pictures([[1.0, 0.2], [0.2, 1.0], [1.0, 0.9]]), torch.tensor([0, 1, 1]))]
    assert zero_shot(Known(), embeddings, images).top1 == pytest.approx(100 * 2 / 3)
    assert curve.judge_of(Known(), embeddings=embeddings)(Known(), images) == zero_shot(Known(), embeddings, images)
    with pytest.raises(StrataViTError, match="3 numbers each, the image features 2"):
        zero_shot(Known(), torch.ones(2, 3), images)


@pytest.mark.parametrize(
    "tensors", [{"a": torch.ones(2, 2), "b": torch.ones(1)}, {"a": torch.ones(3)}, {"a": torch.full((2, 2), torch.nan)}]
)
def test_bad_embeddings_are_refused(tensors, tmp_path):
    save_file(tensors, tmp_path / "text.safetensors")
    with pytest.raises(ArtifactError, match="one tensor"):
        read_embeddings(tmp_path / "text.safetensors")
    with pytest.raises(ArtifactError, match="is not a file"):
        read_embeddings(tmp_path / "absent.safetensors")


def test_features_of_a_sub_network_are_those_of_the_extracted():
    net = converted(headless())
    spec, images, labelled = net.spec(macs=0.6), make_images(4), make_batches()
    small = net.extract(spec=spec)
    with torch.no_grad(), net.at(spec) as inner:
        assert torch.allclose(features(inner, images), features(small, images), atol=1e-6)
    assert knn(net, labelled, labelled, spec).top1 == knn(small, labelled, labelled).top1


def test_features_of_a_classifier_are_what_its_head_reads():
    model, seen = make_model("plain"), []
    model.head.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    with torch.no_grad():
        model(make_images(2))
        assert torch.allclose(features(model, make_images(2)), torch.nn.functional.normalize(seen[0], dim=-1))


def test_an_embedding_head_is_not_a_classifier(tmp_path):
    net, images = converted(clip(), embedding=True), make_batches()
    with pytest.raises(StrataViTError, match="features"):
        stratavit.evaluate(net, images)
    small = net.extract(macs=0.6)
    before = zero_shot(small, torch.eye(12), images)
    stratavit.save(small, tmp_path / "small")
    net.save(tmp_path / "net")
    assert zero_shot(stratavit.load(tmp_path / "small"), torch.eye(12), images) == before
    assert SuperNet.load(tmp_path / "net").embedding


def test_sensitivity_without_a_head_is_the_distance_features_move():
    net, batches = SuperNet(headless()), make_batches()
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
    with pytest.raises(StrataViTError, match="'top1'"):
        bypass_sensitivity(net.model, net.sites, batches, "top1")


def test_widths_of_q_and_k_may_be_given():
    split = SuperNet(enliven(timm.create_model("vit_small_patch16_dinov3", **SIZES, num_classes=0)).eval())
    name = split.sites[0].name
    assert split.resolve({name: {"qk": 16, "v": 8}}) == split.resolve({name: 8})
    assert split.extract(spec={name: {"qk": 16, "v": 8}}).blocks[0].attn.v.out_features == 16
    tied = SuperNet(headless())
    assert tied.resolve({name: {"qk": 8, "v": 8}}) == tied.resolve({name: 8})
    for net, widths, message in (
        (split, {"qk": 8, "v": 8}, "16 there; asked qk 8 with v 8"),
        (tied, {"qk": 16, "v": 8}, "asked qk 16 with v 8"),
        (tied, {"q": 8}, "'qk' and 'v'"),
    ):
        with pytest.raises(StrataViTError, match=message):
            net.resolve({name: widths})


def test_training_by_the_source_needs_no_labels():
    """Of an embedding; without a head, by the command below."""
    pytest.importorskip("accelerate")
    net = converted(clip(), embedding=True)
    before = net.model.blocks[0].mlp.fc1.weight.clone()
    recipe = {"epochs": 1, "list_epochs": 1, "batch_size": 4, "repeats": 1, "workers": 0, "tracker": "none"}
    stratavit.train_piad(net, torch.utils.data.TensorDataset(make_images(12)), config=recipe, cpu=True)
    assert not torch.equal(net.model.blocks[0].mlp.fc1.weight, before)


def test_the_command_trains_without_a_head_and_measures_by_neighbours(tmp_path):
    pytest.importorskip("accelerate")
    converted(headless()).save(tmp_path / "run")
    make_folder(tmp_path / "images", [str(name) for name in range(CLASSES)], train=1, val=1)
    options = "--epochs 1 --list-epochs 1 --batch-size 4 --repeats 1 --workers 0 --tracker none --device cpu"
    paths = [str(tmp_path / name) for name in ("run", "images", "out")]
    assert main(["train", paths[0], "--data", paths[1], "--out", paths[2], *options.split()]) == 0
    assert len((tmp_path / "out" / "curve.csv").read_text().splitlines()) > 1
