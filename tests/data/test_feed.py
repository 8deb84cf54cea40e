"""Images for a measurement: as many as asked, of one fold, none twice at once, whatever the loader's order."""

import random

import pytest
import torch
from helpers import make_batches

from stratavit import StrataViTError
from stratavit.data.feed import Feed
from stratavit.data.pixels import folds_of, keys_of

IMAGE_BYTES = 12


def numbered(numbers, sizes=None):
    """Images that say their number, in batches."""
    images = torch.tensor(list(numbers)).view(-1, 1, 1, 1).expand(-1, 3, 1, 1).float()
    return list(images.split(sizes or 4))


def numbers(batches):
    return [int(n) for batch in batches for n in torch.stack(batch.images)[:, 0, 0, 0]]


def in_turn(wanted):
    """The numbers of either fold in the order in which they are given, computed apart."""
    images = torch.cat(numbered(wanted))
    ranked = sorted(zip(keys_of(images), folds_of(keys_of(images)).tolist(), wanted, strict=True))
    return [[number for _, fold, number in ranked if fold == which] for which in (0, 1)]


class Shuffled:
    """The same images in another order and in other batches at every pass; counts the passes."""

    def __init__(self, wanted, seed=0):
        self.wanted, self.random, self.passes = list(wanted), random.Random(seed), 0

    def __iter__(self):
        self.passes += 1
        self.random.shuffle(self.wanted)
        return iter(numbered(self.wanted, self.random.randint(1, 5)))


@pytest.mark.parametrize("seed", range(25))
def test_takes_go_on_in_an_order_that_only_the_images_give(seed):
    """Cyclically through the fold, or the other one if it is empty; at most all of it; whatever is held at a time."""
    draw = random.Random(seed)
    wanted = [draw.randint(0, 12) for _ in range(draw.randint(1, 24))]  # some are the same
    folds, served = in_turn(wanted), [0, 0]
    feed = Feed(Shuffled(wanted, seed), limit=2 * IMAGE_BYTES * draw.choice([0, 1, 2, 3, 5, 30]))
    for _ in range(20):
        count, fold = draw.choice([1, 1, 2, 3, 5, 30]), draw.randint(0, 1)
        fold = fold if folds[fold] else 1 - fold
        count = min(count, len(folds[fold]))
        expected = [folds[fold][(served[fold] + i) % len(folds[fold])] for i in range(count)]
        assert numbers(feed.take(count, fold)) == expected
        served[fold] += count


@pytest.mark.parametrize("held", [True, False])
def test_the_loader_is_read_once_if_there_is_room_and_memory_is_bounded(held):
    loader = Shuffled(range(40))
    feed = Feed(loader, limit=(80 if held else 20) * IMAGE_BYTES)
    for fold in (0, 1) * 6:
        assert len(numbers(feed.take(10, fold))) == 10
        kept = [image for one in feed._folds for _, image in one._held]
        assert len(kept) <= (40 if held else 20)
        assert all(image.untyped_storage().nbytes() == IMAGE_BYTES for image in kept)
    assert (loader.passes == 1) == held
    assert loader.passes <= 12


def test_folds_are_told_by_pixels_and_shape_and_not_by_type():
    images = torch.randn(64, 3, 4, 4)
    keys = keys_of(images)
    assert len(set(keys)) == 64
    assert set(folds_of(keys).tolist()) == {0, 1}
    order = torch.randperm(64)
    assert keys_of(images[order]) == [keys[i] for i in order]
    assert keys_of(images.double()) == keys_of(images.to(memory_format=torch.channels_last)) == keys
    assert keys_of(torch.zeros(1, 3, 2, 8)) != keys_of(torch.zeros(1, 3, 8, 2))


def test_batches_are_of_one_shape_and_no_larger_than_the_loaders():
    assert max(len(batch.images) for batch in Feed(numbered(range(40), 3)).take(10, 0)) == 3
    feed = Feed([torch.randn(4, 3, 4, 4), torch.randn(4, 3, 4, 8), torch.randn(4, 3, 8, 8).double()])
    taken = [torch.stack(batch.images) for fold in (0, 1) for batch in feed.take(12, fold)]
    assert sum(len(images) for images in taken) == 12
    assert {tuple(images.shape[1:]) for images in taken} == {(3, 4, 4), (3, 4, 8), (3, 8, 8)}


@pytest.mark.parametrize("limit", [0, 10**6])
def test_other_pixels_at_every_pass_still_give_images(limit):
    class Augmented:
        def __init__(self):
            self.generator = torch.Generator().manual_seed(0)

        def __iter__(self):
            return iter([torch.randn(3, 3, 2, 2, generator=self.generator) for _ in range(2)])

    feed = Feed(Augmented(), limit=limit)
    for count in (1, 2, 6, 1, 9) * 8:
        for fold in (0, 1):
            assert 1 <= sum(len(batch.images) for batch in feed.take(count, fold)) <= count


def test_images_all_alike_serve_both_folds():
    for alike, counts in ((1, (1, 1)), (9, (4, 9))):
        feed = Feed(numbered([5] * alike))
        found = [numbers(feed.take(count, fold)) for count in (4, 20) for fold in (0, 1)]
        assert found == [[5] * counts[0]] * 2 + [[5] * counts[1]] * 2


def test_labels_are_not_needed():
    batches = make_batches()
    expected = [Feed([x for x, _ in batches]).take(6, fold) for fold in (0, 1)]
    for loader in (batches, [{"image": x} for x, _ in batches]):
        feed = Feed(loader)
        for fold in (0, 1):
            assert numbers(feed.take(6, fold)) == numbers(expected[fold])


def test_a_generator_that_must_be_read_again_is_refused():
    held, short = (Feed((images for images in numbered(range(20))), limit=limit) for limit in (10**6, 0))
    assert len(numbers(held.take(5, 1) + held.take(20, 1))) >= 10
    assert len(numbers(short.take(3, 1))) == 3
    with pytest.raises(StrataViTError, match="generator"):
        short.take(3, 1)


@pytest.mark.parametrize("loader", [[], (images for images in ()), [torch.zeros(0, 3, 2, 2)]])
def test_no_images_are_refused(loader):
    with pytest.raises(StrataViTError, match="no images"):
        Feed(loader).take(3, 0)
