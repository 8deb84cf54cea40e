"""Numbers at the edge: the function is preserved, or one sentence says why not. Never NaN; same seed, same bits."""

import pytest
import torch
from helpers import PLAN, make_batches, make_images, make_model, relative_error

import stratavit
from stratavit import StrataViTError, SuperNet

IMAGES = make_images(4, seed=9)
METHODS = ("default", "paper")


def constant_features(model):
    """All tokens of all images are alike."""
    for parameter in (model.patch_embed.proj.weight, model.patch_embed.proj.bias, model.pos_embed):
        parameter.zero_()


def dead_values(model):
    """The first head's v is zero in every block."""
    for block in model.blocks:
        block.attn.qkv.weight[64:80] = 0
        block.attn.qkv.bias[64:80] = 0


def dead_outputs(model):
    """Nothing reads the first head, or the first half of the hidden channels."""
    for block in model.blocks:
        block.attn.proj.weight[:, :16] = 0
        block.mlp.fc2.weight[:, :32] = 0


def dead_branches(model):
    """No branch adds anything."""
    for block in model.blocks:
        for layer in (block.attn.proj, block.mlp.fc2):
            layer.weight.zero_()
            layer.bias.zero_()


def duplicated(model):
    """Hidden channels twice, and two heads alike."""
    for block in model.blocks:
        for tensor in (block.mlp.fc1.weight, block.mlp.fc1.bias):
            tensor[32:] = tensor[:32]
        for tensor in (block.attn.qkv.weight, block.attn.qkv.bias):
            by_head = tensor.view(3, 2, 16, *tensor.shape[1:])
            by_head[:, 1] = by_head[:, 0]


def outlier(model):
    """One token of every image is 10^4 times what others are."""
    model.cls_token.fill_(1e4)


def outlier_channel(model):
    """One hidden channel is large, and what reads it small."""
    for block in model.blocks:
        block.mlp.fc1.weight[0] *= 1e4
        block.mlp.fc2.weight[:, 0] /= 1e4


def tiny_weights(model):
    """All maps in the branches near the smallest numbers."""
    for block in model.blocks:
        for layer in (block.attn.qkv, block.attn.proj, block.mlp.fc1, block.mlp.fc2):
            layer.weight *= 1e-12


def no_attention(model):
    """q and k are zero: every token looks at all alike."""
    for block in model.blocks:
        block.attn.qkv.weight[:64] = 0
        block.attn.qkv.bias[:64] = 0


MODELS = (
    *(constant_features, dead_values, dead_outputs, dead_branches, duplicated, outlier, outlier_channel),
    *(tiny_weights, no_attention),
)


def model_with(change):
    model = make_model("plain")
    with torch.no_grad():
        change(model)
    return model


def check(model, batches, method, tolerance=1e-3, images=IMAGES):
    """Converted and sliced: finite everywhere, the full size as before, smaller sizes as their small models."""
    with torch.no_grad():
        before = model(images)
    net = SuperNet(model).contract(batches, method=method)
    net.stratify(batches, plan=PLAN) if method == "default" else net.stratify(batches)
    tensors = {**net.model.state_dict(), **{f"{name} mean": m.channel_mean for name, m in net.elastic.items()}}
    tensors |= {f"{name} factor": m.moments.factor for name, m in net.elastic.items() if m.moments is not None}
    if net.final_mean is not None:
        tensors["final mean"] = net.final_mean.vectors
    wrong = [name for name, tensor in tensors.items() if not tensor.isfinite().all()]
    assert not wrong
    with torch.no_grad():
        assert relative_error(net(images), before) <= tolerance
        for position in range(0, len(net.strata) + 1, 7):
            spec = net.strata.spec(position)
            output = net(images, spec)
            assert output.isfinite().all(), position
            assert relative_error(net.extract(spec=spec)(images), output) <= tolerance, position


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("change", MODELS, ids=lambda change: change.__name__)
def test_weights_at_the_edge(change, method):
    check(model_with(change), make_batches(), method)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("count", [1, 2])
def test_fewer_images_than_dimensions(count, method):
    """One image gives 17 tokens for 64 hidden channels."""
    check(make_model("plain"), make_batches((count,)), method)


def extreme_pixel():
    images = make_images(12)
    images[0, :, 0, 0] = 1e4
    return images, torch.arange(12) % 7


def black():
    return torch.zeros(12, 3, 32, 32), torch.zeros(12, dtype=torch.long)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("images", [black, extreme_pixel])
def test_images_at_the_edge(images, method):
    check(make_model("plain"), [images()], method)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("classes", [1, 2])
def test_a_head_of_one_or_two_outputs(classes, method):
    model = make_model("plain")
    model.reset_classifier(classes)
    torch.nn.init.normal_(model.head.weight, generator=torch.Generator().manual_seed(0))
    check(model, [x for x, _ in make_batches()], method)


@pytest.mark.parametrize("case", ["infinite", "too large to be squared", "beyond half precision"])
def test_images_that_give_no_numbers_are_refused(case):
    model, ((images, labels),) = make_model("plain"), make_batches((12,))
    if case == "beyond half precision":
        model.blocks[0].mlp.fc1.weight.data *= 3e5
        model, images = model.half(), images.half()
    else:
        images[0, 0, 0, 0] = float("inf") if case == "infinite" else 1e30
        model.patch_embed.proj.weight.data *= 1e15
    with pytest.raises(StrataViTError, match="NaN or infinite"):
        SuperNet(model).contract([(images, labels)])


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("change", "dtype"), [(lambda model: None, torch.bfloat16), (dead_values, torch.float16)])
def test_half_precision(change, dtype, method):
    model, tolerance = model_with(change).to(dtype), 20 * torch.finfo(dtype).eps
    check(model, make_batches(dtype=dtype), method, tolerance, IMAGES.to(dtype))


@pytest.mark.parametrize("method", METHODS)
def test_same_seed_same_bits(method, tmp_path):
    for name in ("one", "two"):
        net = SuperNet(make_model("plain")).contract(make_batches(), method=method)
        net.stratify(make_batches(), plan=PLAN) if method == "default" else net.stratify(make_batches())
        net.save(tmp_path / name)
        stratavit.save(net.extract(macs=0.6, verbose=False), tmp_path / f"{name}-small")
        torch.randn(7)  # whatever else draws
    for pair in (("one", "two"), ("one-small", "two-small")):
        files = [{file.name: file.read_bytes() for file in (tmp_path / name).iterdir()} for name in pair]
        assert files[0].keys() == files[1].keys() >= {"stratavit.json", "model.safetensors"}
        assert [name for name in files[0] if files[0][name] != files[1][name]] == []
