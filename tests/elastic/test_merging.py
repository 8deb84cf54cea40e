"""Merging of tokens: what is equal may be merged without a trace, every patch is accounted for, an image is alone."""

import pytest
import timm
import torch
from helpers import enliven, make_images, make_model, relative_error

from stratavit.elastic.merging import MergingBlock, least, merge, unmerge, unmerged


def merging(model, keep, prefix=1, full=16):
    """A copy of a ViT whose blocks merge: block number -> patch tokens that it passes on."""
    last = len(model.blocks) - 1
    for number, block in enumerate(model.blocks):
        model.blocks[number] = MergingBlock(block, prefix, number == last, keep.get(number), full)
    return model.eval()


def random_state(count=12, prefix=2, batch=3, width=8):
    return unmerged(torch.randn(batch, prefix + count, width, generator=torch.Generator().manual_seed(0)), prefix)


@pytest.mark.parametrize("family", ["plain", "layer_scale", "registers", "avg_pool"])
def test_nothing_merged_is_bit_identical(family):
    images = make_images(3)
    with torch.no_grad():
        expected = make_model(family)(images)
        assert torch.equal(merging(make_model(family), {})(images), expected)
        assert torch.equal(merging(make_model(family), {0: 16})(images), expected)


@pytest.mark.parametrize("counts", [(8, 4), (11,), (10, 9, 5)])
def test_every_patch_is_in_one_token_that_is_the_mean_of_its_patches(counts):
    start = random_state()
    state = start
    for keep in counts:
        state = merge(state, state.tokens, keep, prefix=2)
    assert state.tokens.shape == (3, 2 + counts[-1], 8)
    assert torch.equal(state.tokens[:, :2], start.tokens[:, :2])  # class and registers stay
    for image in range(3):
        homes = state.home[image]
        assert torch.equal(homes.bincount(minlength=counts[-1]).float(), state.size[image])
        for token in range(counts[-1]):
            mean = start.tokens[image, 2:][homes == token].mean(dim=0)
            assert torch.allclose(state.tokens[image, 2 + token], mean, atol=1e-6)
            assert homes[state.place[image, token]] == token  # it keeps the position of one of its patches
        assert torch.equal(state.place[image].sort().values, state.place[image])  # as they lie in the image


def test_the_most_similar_are_merged():
    tokens = torch.eye(9).unsqueeze(0)
    tokens[0, 4] = tokens[0, 3] + 0.01 * tokens[0, 8]  # 3 is a destination, 4 is not
    state = merge(unmerged(tokens, 0), tokens, 8, prefix=0)
    assert state.home[0, 3] == state.home[0, 4]
    assert state.size.max() == 2


def test_equal_tokens_are_merged_without_a_trace():
    """Attention sees a token as often as it has patches: of equal patches nothing is lost."""
    model = make_model("plain").double()
    torch.nn.init.zeros_(model.pos_embed)
    images = make_images(2).double()
    patches = images.unfold(2, 8, 8).unfold(3, 8, 8)  # [B, 3, 4, 4, 8, 8], patches in rows
    for first in (0, 3, 6, 9, 12):  # after every destination one that equals it
        patches[:, :, (first + 1) // 4, (first + 1) % 4] = patches[:, :, first // 4, first % 4]
    images = patches.permute(0, 1, 2, 4, 3, 5).reshape(2, 3, 32, 32)
    with torch.no_grad():
        expected = model.forward_features(images)
        found = merging(model, {0: 11}).forward_features(images)
    assert relative_error(found, expected) < 1e-8  # sizes are float32


def test_an_image_is_merged_alone():
    model, images = merging(make_model("plain"), {0: 9, 1: 4}), make_images(5)
    with torch.no_grad():
        together, alone = model(images), torch.cat([model(image[None]) for image in images])
    assert relative_error(together, alone) < 1e-5


def test_other_image_sizes_keep_the_same_share():
    model = timm.create_model("vit_tiny_patch16_224", img_size=64, depth=2, dynamic_img_size=True, num_classes=3)
    model, seen = merging(enliven(model), {0: 8}, full=16), []
    model.blocks[1].register_forward_pre_hook(lambda _, args: seen.append(args[0].size.shape[1]))
    with torch.no_grad():
        for side in (64, 96, 128):
            model(torch.randn(1, 3, side, side))
    assert seen == [8, 18, 32]


def test_what_cannot_be_merged_at_once_is_merged_as_far_as_it_goes():
    assert least(16) == 6
    assert merge(random_state(16), random_state(16).tokens, 6, 2).size.shape == (3, 6)


def test_gradients_pass_through_merges():
    model = merging(make_model("plain"), {0: 8})
    model(make_images(2)).square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("prefix", [0, 1])
def test_unmerged_and_back(prefix):
    tokens = torch.randn(2, prefix + 7, 4)
    assert torch.equal(unmerge(unmerged(tokens, prefix)), tokens)
