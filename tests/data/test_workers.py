"""Worker processes of image loaders: they stay from one pass to the next, and end in time."""

import gc
import multiprocessing
import sys

import pytest
import torch
from PIL import Image

from stratavit import StrataViTError, image_loader
from stratavit.data import image_folder
from stratavit.training import order

CONFIG = {"input_size": (3, 8, 8)}


@pytest.fixture
def loader(tmp_path):
    for label in ("a", "b"):
        (tmp_path / "val" / label).mkdir(parents=True)
        for number in range(4):
            Image.new("RGB", (8, 8), (60 * number,) * 3).save(tmp_path / "val" / label / f"{number}.png")
    return image_loader(tmp_path, CONFIG, "val", None, batch_size=2, workers=2)


def workers():
    return {process.pid for process in multiprocessing.active_children()}


def everything(loader):
    images, labels = zip(*loader, strict=True)
    return torch.cat(images), torch.cat(labels)


@pytest.fixture(autouse=True)
def before():
    gc.collect()
    return workers()


def test_they_stay_until_the_loader_is_closed_or_gone(loader, before):
    assert workers() == before  # none without need
    first = everything(loader)
    alive = workers() - before
    assert len(alive) == 2
    second = everything(loader)
    assert workers() - before == alive
    assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))
    loader.close()
    assert workers() == before
    assert torch.equal(everything(loader)[0], first[0])
    assert len(workers() - before) == 2
    image_folder.rest(None, [1], loader)
    assert workers() == before
    everything(loader)
    del loader
    gc.collect()


def test_they_end_with_the_loader(loader, before):
    def used():
        everything(image_folder.ImageLoader(loader.dataset, 2, 2))

    used()
    gc.collect()
    assert workers() == before


def test_a_pass_that_is_given_up_ends_them(loader, before):
    batches = iter(loader)
    next(batches)
    assert workers() != before
    batches.close()
    assert workers() == before
    assert everything(loader)[1].tolist() == [0] * 4 + [1] * 4


def test_a_pass_within_a_pass(loader, before):
    expected, labels = everything(loader)[1], []
    for _, outer in loader:
        assert torch.equal(everything(loader)[1], expected)
        labels.append(outer)
    assert torch.equal(torch.cat(labels), expected)


def test_a_pass_that_fails_ends_them(loader, before, monkeypatch):
    def fail(self, index):
        raise StrataViTError("ours")

    with monkeypatch.context() as patch:
        patch.setattr(image_folder.ImageFolder, "__getitem__", fail)
        with pytest.raises(StrataViTError, match=r"^ours$"):
            list(loader)
    assert workers() == before
    assert len(everything(loader)[1]) == 8


def test_nothing_is_drawn_from_the_general_generator(loader):
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    everything(loader)
    everything(loader)
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.parametrize("init", [image_folder._leave_quietly, order._leave_signals_to_the_parent])
def test_a_thread_whose_reader_has_gone_says_nothing(init, capfd):
    """Where a worker hands tensors over, multiprocessing tells errors of its own so."""

    def work():
        init(0)
        sys.excepthook(EOFError, EOFError("gone"), None)

    process = multiprocessing.get_context("fork").Process(target=work)
    process.start()
    process.join()
    assert process.exitcode == 0
    assert capfd.readouterr().err == ""
