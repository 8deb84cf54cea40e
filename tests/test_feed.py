"""Images for a measurement: as many as asked, of one fold, in turn, none twice at once."""

import pytest
import torch
from helpers import make_batches
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from stratavit import StrataViTError
from stratavit.feed import Feed
from stratavit.statistics import folds_of

BATCHES = [images for images, _ in make_batches()]


def numbered(sizes):
    """Batches of images that say their number."""
    return list(torch.arange(sum(sizes)).view(-1, 1, 1, 1).expand(-1, 3, 1, 1).float().split(sizes))


def numbers(batches):
    return [int(n) for images in batches for n in images[:, 0, 0, 0]]


SIZES = st.lists(st.integers(1, 5), min_size=1, max_size=5).filter(lambda sizes: sum(sizes) > 1)


def test_folds_take_turns_whatever_the_batches():
    assert torch.cat([folds_of(0, 3), folds_of(3, 1), folds_of(4, 2)]).tolist() == [0, 1, 0, 1, 0, 1]


@given(SIZES, st.lists(st.tuples(st.integers(1, 12), st.integers(0, 1)), max_size=6))
def test_images_of_a_fold_come_in_turn_as_many_as_asked_and_none_twice_at_once(sizes, takes):
    """A take asks for no more than the fold has, so that every one is exact; the next goes on where it stopped."""
    feed, folds, seen = Feed(numbered(sizes)), [list(range(sum(sizes)))[fold::2] for fold in (0, 1)], ([], [])
    for count, fold in takes:
        count = min(count, len(folds[fold]))
        taken = numbers(feed.take(count, fold))
        assert len(taken) == len(set(taken)) == count
        seen[fold].extend(taken)
    for fold in (0, 1):
        assert seen[fold] == [folds[fold][i % len(folds[fold])] for i in range(len(seen[fold]))]


@given(SIZES, st.lists(st.tuples(st.integers(1, 60), st.integers(0, 1)), max_size=5))
def test_small_sets_give_all_they_have_and_none_twice(sizes, takes):
    feed = Feed(numbered(sizes))
    for count, fold in takes:
        taken = numbers(feed.take(count, fold))
        assert len(taken) == len(set(taken)) == min(count, (sum(sizes) + 1 - fold) // 2)
        assert all(number % 2 == fold for number in taken)


def test_a_single_image_serves_both_folds():
    feed = Feed(numbered([1]))
    assert [numbers(feed.take(3, fold)) for fold in (0, 1, 0, 1)] == [[0]] * 4


def test_labels_are_not_needed_and_any_loader_will_do():
    images = torch.cat(BATCHES)
    dataset = torch.utils.data.TensorDataset(images, torch.zeros(len(images), dtype=torch.long))
    for loader in (BATCHES, [(x,) for x in BATCHES], make_batches(), DataLoader(dataset, batch_size=4)):
        feed = Feed(loader)
        for fold in (0, 1, 1, 0):
            assert torch.equal(torch.cat(feed.take(6, fold)), images[fold::2])


def test_a_generator_serves_one_pass_and_is_refused_when_used_up():
    feed = Feed(images for images in numbered([4, 4]))
    assert numbers(feed.take(3, 1)) == [1, 3, 5]
    with pytest.raises(StrataViTError, match=r"no images; a generator.*list or a DataLoader"):
        feed.take(3, 1)


@pytest.mark.parametrize("loader", [[], (images for images in ())])
def test_no_images_are_refused(loader):
    with pytest.raises(StrataViTError, match="no images"):
        Feed(loader).take(3, 0)
