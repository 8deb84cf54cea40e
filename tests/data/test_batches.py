"""What a loader yields is read as it is meant, or refused in one sentence: never a traceback, never another number."""

import copy
from collections import UserDict, namedtuple

import numpy as np
import pytest
import timm
import torch
from helpers import CLASSES, PLAN, make_batches, make_images, make_model, make_net
from timm.models.vision_transformer import VisionTransformer
from torch import nn
from torch.utils.data import DataLoader, IterableDataset

import stratavit
from stratavit import StrataViTError, SuperNet
from stratavit.data import batches
from stratavit.data.batches import batches_of, check_images
from stratavit.dropout_list.sensitivity import bypass_sensitivity
from stratavit.utils.signals import Terminated

IMAGES, LABELS = make_images(6), torch.tensor([0, 1, 2, 3, 4, 0])
Pair = namedtuple("Pair", ["pictures", "classes"])


def weights(net):
    return [p.flatten().tolist() for p in net.parameters()]


ROWS = torch.randn(CLASSES, 32, generator=torch.Generator().manual_seed(0))
MEASURES = {
    "evaluate": lambda loader: stratavit.evaluate(make_model("plain"), loader),
    "evaluate a super-network": lambda loader: stratavit.evaluate(make_net("plain"), loader),
    "knn": lambda loader: stratavit.knn(make_model("plain"), make_batches(), loader),
    "bank of knn": lambda loader: stratavit.knn(make_model("plain"), loader, make_batches()),
    "zero_shot": lambda loader: stratavit.zero_shot(make_model("plain"), ROWS, loader),
}
DOORS = {
    "contract": lambda loader: weights(SuperNet(make_model("plain")).contract(loader)),
    "paper": lambda loader: weights(SuperNet(make_model("plain")).contract(loader, method="paper").stratify(loader)),
    "stratify": lambda loader: copy.deepcopy(make_net("plain")).stratify(loader, plan=PLAN).strata.entries,
    "sensitivity": lambda loader: bypass_sensitivity(make_net("plain").model, make_net("plain").sites, loader),
    **MEASURES,
}
every_measure = pytest.mark.parametrize("door", MEASURES.values(), ids=MEASURES)
every_door = pytest.mark.parametrize("door", DOORS.values(), ids=DOORS)

TAKEN = {
    "labels in 8 bits": (IMAGES, LABELS.to(torch.uint8)),
    "labels in uint64": (IMAGES, LABELS.to(torch.uint64)),
    "a named tuple": Pair(IMAGES, LABELS),
    "numpy, big-endian": (IMAGES.numpy().astype(">f4"), LABELS.numpy().astype(">i2")),
    "numpy, read only": [np.broadcast_to(IMAGES.numpy(), IMAGES.shape), LABELS.numpy()],
    "image and label": {"image": IMAGES, "label": LABELS, "file": ["a"] * 6, "index": torch.arange(6)},
    "pixel_values next to undecoded images": {"image": ["a"] * 6, "pixel_values": IMAGES, "labels": LABELS},
    "another mapping": UserDict(images=IMAGES, labels=LABELS),
    "float64": (IMAGES.double(), LABELS),
    "with a graph": (IMAGES.clone().requires_grad_() * 1.0, LABELS),
}


@pytest.mark.parametrize("batch", TAKEN.values(), ids=TAKEN)
def test_images_and_labels_keep_their_values(batch):
    ((images, labels),) = batches_of([batch], make_model("plain"), finite=True)
    assert labels.dtype == torch.int64
    assert torch.equal(labels, LABELS)
    assert torch.equal(images.float(), IMAGES)
    assert not images.requires_grad


@every_door
def test_every_door_reads_batches_of_any_form(door):
    """A mapping; double or half precision; tensors of inference mode; batches without images."""
    with torch.inference_mode():
        apart = IMAGES[:2].clone(), LABELS[:2].clone()
    half = IMAGES[4:].half()
    empty = {"image": IMAGES[:0], "label": LABELS[:0]}
    mixed = [empty, apart, {"image": IMAGES[2:4].double(), "label": LABELS[2:4].short().numpy()}, (half, LABELS[4:])]
    plain = [part.split(2) for part in (torch.cat([IMAGES[:4], half.float()]), LABELS)]
    assert door(mixed) == door(list(zip(*plain, strict=True)))
    with pytest.raises(StrataViTError, match="no images"):
        door([empty])
    with pytest.raises(StrataViTError, match=r"^loader: .* 64 x 64"):
        door([(torch.randn(6, 3, 64, 64), LABELS)])


REFUSED = {
    "32 x 64": (torch.randn(6, 3, 32, 64), LABELS),
    "channels last": (IMAGES.permute(0, 2, 3, 1), LABELS),
    "one channel": (IMAGES[:, :1], LABELS),
    "one image": (IMAGES[0], LABELS[:1]),
    "uint8 images": ((IMAGES * 50).to(torch.uint8), LABELS),
    "numpy objects": (np.array([object()] * 6), LABELS),
    "images that are not finite": (IMAGES / 0, LABELS),
    "float labels": (IMAGES, LABELS.float()),
    "bool labels": (IMAGES, LABELS > 0),
    "complex labels": (IMAGES, LABELS.to(torch.complex64)),
    "one-hot labels": (IMAGES, nn.functional.one_hot(LABELS, CLASSES)),
    "too few labels": (IMAGES, LABELS[:5]),
    "labels in a list": (IMAGES, LABELS.tolist()),
    "three parts": (IMAGES, LABELS, LABELS),
    "no parts": (),
    "nested": ((IMAGES, LABELS), LABELS),
    "a mapping without images": {"pixels": IMAGES, "labels": LABELS},
    "a mapping of two images": {"image": IMAGES, "pixel_values": IMAGES + 1, "labels": LABELS},
    "a mapping of labels in a list": {"image": IMAGES, "label": LABELS.tolist()},
    "a word": "images",
    "nothing": None,
}


@pytest.mark.parametrize("batch", REFUSED.values(), ids=REFUSED)
def test_refused_in_one_sentence(batch):
    with pytest.raises(StrataViTError, match=r"^loader: [^\n]{,280}$"):
        list(batches_of([batch], make_model("plain"), finite=True))


@every_measure
def test_measuring_needs_labels_and_finite_images(door):
    images = IMAGES.clone()
    images[3, 1, 5, 5] = float("nan")
    with pytest.raises(StrataViTError, match="NaN"):
        door([(images, LABELS)])
    for batch in (IMAGES, (IMAGES,), (IMAGES, None), {"image": IMAGES}, {"image": IMAGES, "label": None}):
        with pytest.raises(StrataViTError, match="no labels"):
            door([batch])


def test_a_model_that_outputs_nan_is_not_measured():
    model = make_model("plain")
    with torch.no_grad():
        model.head.bias[2] = float("nan")
    with pytest.raises(StrataViTError, match="NaN"):
        stratavit.evaluate(model, [(IMAGES, LABELS)])


# ---- sizes that models take -----------------------------------------------------------------------------

SMALL = {"embed_dim": 32, "num_classes": CLASSES}
VIT = {**SMALL, "img_size": 32, "patch_size": 8, "depth": 1, "num_heads": 2}
SWIN = {**SMALL, "img_size": 64, "depths": (1, 1), "num_heads": (2, 2), "window_size": 4}
MODELS = {
    "oblong": lambda: VisionTransformer(**VIT | {"img_size": (32, 48)}),
    "dynamic": lambda: VisionTransformer(**VIT, dynamic_img_size=True),
    "padded": lambda: VisionTransformer(**VIT, dynamic_img_size=True, dynamic_img_pad=True),
    "grey": lambda: VisionTransformer(**VIT, in_chans=1),
    "swin": lambda: timm.models.SwinTransformer(**SWIN),
    "swin, any size": lambda: timm.models.SwinTransformer(**SWIN, strict_img_size=False),
    "eva, dynamic": lambda: timm.models.Eva(**VIT, use_rot_pos_emb=True, dynamic_img_size=True),
}
SIZES = [(3, 32, 32), (3, 64, 64), (3, 32, 48), (3, 48, 32), (3, 36, 36), (3, 7, 9), (1, 32, 32)]


@pytest.mark.parametrize("name", MODELS)
def test_refused_are_just_the_images_that_the_model_cannot_run(name):
    model = MODELS[name]().eval()
    for size in [*SIZES, (3, *model.patch_embed.img_size)]:
        images = torch.randn(2, *size)
        try:
            with torch.no_grad():
                model(images)
        except Exception:
            with pytest.raises(StrataViTError, match=r"^here: .*images"):
                check_images(model, images, "here")
        else:
            check_images(model, images)


def test_a_convolutional_stem_does_not_say_what_it_takes():
    hybrid = timm.create_model("vit_tiny_r_s16_p8_224", img_size=64, depth=1, num_classes=CLASSES).eval()
    assert stratavit.evaluate(hybrid, [(torch.randn(2, 3, 64, 64), LABELS[:2])]).n == 2


def test_models_that_prepare_images_themselves_are_not_judged():
    class Resizing(VisionTransformer):
        def forward(self, x):
            return super().forward(nn.functional.interpolate(x, (32, 32)))

    large, hooked = [(torch.randn(2, 3, 64, 64), LABELS[:2])], VisionTransformer(**VIT)
    hooked.register_forward_pre_hook(lambda module, args: (nn.functional.interpolate(args[0], (32, 32)),))
    wrapped = nn.Sequential(nn.Upsample(32), VisionTransformer(**VIT))
    for model in (Resizing(**VIT), hooked, wrapped):
        assert stratavit.evaluate(model, large).n == 2


def test_what_a_model_of_ones_own_says_is_not_hidden():
    class Picky(VisionTransformer):
        def forward(self, images):
            raise ValueError("nine by nine, please")

    with pytest.raises(ValueError, match="nine by nine"):
        stratavit.evaluate(Picky(**VIT), [(IMAGES, LABELS)])


def test_batches_of_mixed_sizes_are_taken_where_the_model_takes_them():
    model = VisionTransformer(**VIT, dynamic_img_size=True).eval()
    mixed = [(torch.randn(3, 3, 32, 32), LABELS[:3]), (torch.randn(3, 3, 48, 64), LABELS[3:])]
    assert stratavit.evaluate(SuperNet(model).contract(mixed).stratify(mixed, plan=PLAN), mixed).n == 6


# ---- training and export --------------------------------------------------------------------------------


class Items(torch.utils.data.Dataset):
    """Single items of a batch."""

    def __init__(self, make):
        self.make = make

    def __len__(self):
        return 4

    def __getitem__(self, index):
        return self.make(IMAGES[index], int(LABELS[index]))


def finetuned(make, out):
    recipe = {"epochs": 1, "batch_size": 4, "workers": 0, "lr": 1e-3}
    return stratavit.finetune(make_model("plain"), Items(make), config=recipe, out=out, cpu=True).state_dict()


def test_training_takes_mappings_and_any_integers(tmp_path):
    plain = finetuned(lambda image, label: (image, label), tmp_path / "plain")
    found = finetuned(lambda image, label: {"image": image.numpy(), "label": np.int16(label)}, tmp_path / "x")
    assert all(torch.equal(value, plain[key]) for key, value in found.items())


@pytest.mark.parametrize(
    "make",
    [
        lambda image, label: (torch.randn(3, 64, 64), label),
        lambda image, label: (image, float(label)),
        lambda image, label: (image, torch.rand(CLASSES)),
        lambda image, label: {"pixels": image, "label": label},
    ],
)
def test_training_refuses_what_does_not_fit(make, tmp_path):
    with pytest.raises(StrataViTError, match=r"^train: [^\n]*$"):
        finetuned(make, tmp_path / "run")


class InTurn(IterableDataset):
    def __iter__(self):
        yield from zip(IMAGES, LABELS, strict=True)


@pytest.mark.parametrize("data", [InTurn(), DataLoader(list(zip(IMAGES, LABELS, strict=True)), 1), None])
@pytest.mark.parametrize("train", [stratavit.finetune, stratavit.train_piad])
def test_training_needs_images_by_their_numbers(train, data, tmp_path):
    model = make_model("plain") if train is stratavit.finetune else copy.deepcopy(make_net("plain", stratified=True))
    with pytest.raises(StrataViTError, match=rf"^train: expected a data set .* got {type(data).__name__}"):
        train(model, data, out=tmp_path / "run", cpu=True)


@pytest.mark.parametrize(
    "images",
    [torch.randn(2, 3, 64, 64), IMAGES[0], IMAGES[:0], IMAGES * float("nan"), "images", [IMAGES]],
    ids=["64 x 64", "one image", "none", "nan", "a word", "a list"],
)
def test_export_refuses_images_that_do_not_fit(images, tmp_path):
    with pytest.raises(StrataViTError, match=r"^export: [^\n]*images"):
        stratavit.export(make_model("plain"), tmp_path / "model", "torch", images=images)
    assert not any(tmp_path.iterdir())


def ended_worker(stop=None):
    try:
        if stop is not None:
            raise stop
    finally:
        raise RuntimeError("DataLoader worker (pid(s) 7) exited unexpectedly")


@pytest.mark.parametrize("stop", [KeyboardInterrupt, Terminated])
def test_a_signal_is_not_taken_for_a_worker_that_was_ended(stop):
    """The workers got it too, and torch may notice their end while the signal is being handled."""
    with pytest.raises(stop), batches.watched("images: "):
        ended_worker(stop)
    with pytest.raises(StrataViTError, match="ended from outside"), batches.watched("images: "):
        ended_worker()
