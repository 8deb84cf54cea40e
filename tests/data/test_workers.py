"""Worker processes of image loaders: they stay from one pass to the next, and end in time."""

import gc
import multiprocessing
import sys

import pytest
import torch
from image_folders import CONFIG, write

from stratavit import StrataViTError, image_loader
from stratavit.data import image_folder
from stratavit.training import order


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write(tmp_path_factory.mktemp("images"), *(f"val/{label}/{n}.png" for label in "ab" for n in range(4)))


@pytest.fixture
def loader(folder):
    return image_loader(folder, CONFIG, "val", None, batch_size=2, workers=2)


def workers():
    return {process.pid for process in multiprocessing.active_children()}


def labels(loader):
    return torch.cat([labels for _, labels in loader]).tolist()


@pytest.fixture(autouse=True)
def before():
    gc.collect()
    return workers()


def test_they_stay_until_the_loader_is_closed_or_gone(loader, before):
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    assert workers() == before  # none without need
    assert labels(loader) == [0] * 4 + [1] * 4
    alive = workers() - before
    assert len(alive) == 2
    assert labels(loader) == [0] * 4 + [1] * 4
    assert workers() - before == alive
    assert torch.equal(torch.rand(3), expected)  # nothing is drawn from the general generator
    loader.close()
    assert workers() == before
    labels(loader)
    assert len(workers() - before) == 2
    image_folder.rest(None, [1], loader)
    assert workers() == before

    def used():
        labels(image_folder.ImageLoader(loader.dataset, 2, 2))

    used()
    gc.collect()
    assert workers() == before


def test_a_pass_that_is_given_up_or_fails_ends_them(loader, before, monkeypatch):
    batches = iter(loader)
    next(batches)
    assert workers() != before
    batches.close()
    assert workers() == before

    def fail(self, index):
        raise StrataViTError("ours")

    with monkeypatch.context() as patch:
        patch.setattr(image_folder.ImageFolder, "__getitem__", fail)
        with pytest.raises(StrataViTError, match=r"^ours$"):
            list(loader)
    assert workers() == before
    assert labels(loader) == [0] * 4 + [1] * 4


def test_a_pass_within_a_pass(loader, before):
    outer = []
    for _, found in loader:
        outer += found.tolist()
        if len(outer) in (2, 6):
            assert labels(loader) == [0] * 4 + [1] * 4
    assert outer == [0] * 4 + [1] * 4


@pytest.mark.parametrize("init", [image_folder._leave_quietly, order._leave_signals_to_the_parent])
def test_a_thread_whose_reader_has_gone_says_nothing(init, capfd):
    """Where a worker hands tensors over, multiprocessing prints errors of its own so."""

    def work():
        init(0)
        sys.excepthook(EOFError, EOFError("gone"), None)

    process = multiprocessing.get_context("fork").Process(target=work)
    process.start()
    process.join()
    assert process.exitcode == 0
    assert capfd.readouterr().err == ""
