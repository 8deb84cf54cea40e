"""What a model computes by hooks, methods or classes of its own is never lost without a word."""

import types

import architectures
import pytest
import torch
from helpers import make_images, make_model, relative_error
from timm.models.vision_transformer import VisionTransformer
from torch import nn

import stratavit
from stratavit import ArtifactError, SuperNet, UnsupportedModelError
from stratavit.models.output_checks import Subject, check_same_outputs

VIT, EVA, BEIT = "vit_tiny_patch16_224", "eva02_tiny_patch14_224", "beit_base_patch16_224"
NAMES = (VIT, EVA, BEIT, "swin_tiny_patch4_window7_224", "swinv2_tiny_window8_256")
SIZES = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2, "num_classes": 7}
IMAGES = make_images(2)


def turned_after(module, args, out):
    return out.roll(1, -1)  # norms do not undo it


def first_block(model):
    return next(name for name, module in model.named_modules() if hasattr(module, "attn") and name)


def hook(model, name):
    model.get_submodule(name).register_forward_hook(turned_after)


def pre_hook(model, name):
    model.get_submodule(name).register_forward_pre_hook(lambda module, args: (args[0].roll(1, -1), *args[1:]))


def own_method(model, name, method="forward"):
    """As ``module.forward = ...`` does; the old one is still that of this object."""
    module = model.get_submodule(name)
    old = getattr(module, method)
    setattr(module, method, lambda *args, **kwargs: old(*args, **kwargs).roll(1, -1))


PARTS = ("{}.attn", "{}.mlp", "{}.attn.proj", "{}.mlp.fc2", "{}.norm1", "{}", "patch_embed", "")


@pytest.mark.parametrize("way", [hook, pre_hook, own_method])
@pytest.mark.parametrize(
    ("name", "part"),
    [
        *((name, part) for name in (VIT, NAMES[-1]) for part in PARTS),
        *((name, "{}.attn") for name in NAMES),
        *((EVA, "{}.mlp.fc1"), (VIT, "{}.attn.qkv")),  # whose weights alone are used by elastic modules
    ],
)
def test_what_is_not_in_weights_is_refused_by_name(name, part, way):
    model = architectures.make(name)
    where = part.format(first_block(model))
    way(model, where)
    with pytest.raises(UnsupportedModelError) as caught:
        SuperNet(model)
    assert f": {where or 'the model itself'} (" in str(caught.value)


@pytest.mark.parametrize("method", ["forward_head", "pool", "_pos_embed", "forward_features"])
def test_methods_of_the_model_itself(method):
    model = make_model("plain")
    own_method(model, "", method)
    with pytest.raises(UnsupportedModelError, match=f"{method} of its own"):
        SuperNet(model)


@pytest.mark.parametrize("method", ["forward_head", "pool", "_pos_embed"])
@pytest.mark.parametrize("factor", [1.5, 1.0])
def test_methods_of_a_subclass(method, factor):
    def changed(self, *args, **kwargs):
        return factor * getattr(VisionTransformer, method)(self, *args, **kwargs)

    kind = type("Own", (VisionTransformer,), {method: changed, "__module__": "elsewhere"})
    torch.manual_seed(0)
    model = kind(**SIZES).eval()
    if factor != 1:
        with pytest.raises(UnsupportedModelError, match="class Own"):
            SuperNet(model)
    else:  # computes what timm's does
        with torch.no_grad():
            assert relative_error(SuperNet(model)(IMAGES), model(IMAGES)) < 1e-5


def test_a_head_of_zeros_hides_nothing():
    model = make_model("plain")
    hook(model, "blocks.0")
    nn.init.zeros_(model.head.weight)
    with pytest.raises(UnsupportedModelError, match=r"blocks\.0 \(a hook\)"):
        SuperNet(model)


def test_modules_that_are_called_by_keyword_are_named_too():
    model = make_model("plain")
    own_method(model, "blocks.0")

    def forward_features(images, **options):
        tokens = model._pos_embed(model.patch_embed(images))
        for block in model.blocks:
            tokens = block(x=tokens)
        return model.norm(tokens)

    model.forward_features = forward_features
    with pytest.raises(UnsupportedModelError, match=r"blocks\.0 \(forward of its own\)"):
        SuperNet(model)


@pytest.mark.parametrize("name", NAMES)
def test_hooks_that_only_observe_stay(name):
    model, seen = architectures.make(name), []
    for module in (model, model.get_submodule(first_block(model)), model.get_submodule(first_block(model)).attn):
        module.register_forward_hook(lambda module, args, out: seen.append(out.shape))
        module.register_forward_pre_hook(lambda module, args: None)
    net = SuperNet(model).eval()
    with torch.no_grad():
        assert relative_error(net(IMAGES), model(IMAGES)) < 1e-5
    assert seen


def test_methods_set_on_instances_that_change_nothing_do_not_lead_to_the_source(tmp_path):
    """``forward`` of the copy would be that of the source, whose widths are always full."""
    model = make_model("plain")
    for name in ("", "blocks.0", "blocks.0.attn", "blocks.1.mlp"):
        module = model.get_submodule(name)
        module.forward = lambda *args, old=module.forward, **kwargs: old(*args, **kwargs)
    net, spec = SuperNet(model).eval(), {"blocks.0.attn": 8, "blocks.1.mlp": 2}
    small = net.extract(spec=spec, verbose=False)
    stratavit.save(small, tmp_path / "small")
    with torch.no_grad():
        assert relative_error(net(IMAGES, spec), small(IMAGES)) < 1e-5
        assert relative_error(net(IMAGES), small(IMAGES)) > 1e-2
        assert torch.equal(stratavit.load(tmp_path / "small")(IMAGES), small(IMAGES))


@pytest.mark.parametrize("change", [lambda m: hook(m, "blocks.1.mlp"), lambda m: own_method(m, "", "pool")])
def test_small_models_and_super_networks_changed_later(tmp_path, change):
    net = SuperNet(make_model("plain"))
    small = net.extract(spec={"blocks.0.attn": 8}, verbose=False)
    change(small), change(net.model)
    for save in (lambda: stratavit.save(small, tmp_path / "x"), lambda: net.save(tmp_path / "x")):
        with pytest.raises(ArtifactError):
            save()
    assert not (tmp_path / "x").exists()


def test_a_hook_on_a_model_of_transformers():
    model = architectures.make("ViTForImageClassification")
    model.vit.layers[0].register_forward_hook(turned_after)
    with pytest.raises(UnsupportedModelError):
        SuperNet(model)


def raising(error):
    def run(*args):
        raise error

    return run


@pytest.mark.parametrize(
    ("forward", "words"),
    [
        (lambda images: {"logits": images}, "dict"),
        (lambda images: images.new_full((len(images), 7), float("inf")), "infinite"),
        (lambda images: images.new_zeros(len(images), 3), "inf of the largest"),  # of another shape
        (raising(ZeroDivisionError("shapes")), "ZeroDivisionError: shapes"),
    ],
)
def test_outputs_that_are_no_logits(forward, words):
    model = make_model("plain")
    model.forward = forward
    with pytest.raises(UnsupportedModelError, match=words):
        SuperNet(model)


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("CUDA out of memory")])
def test_out_of_memory_is_raised_as_it_is(error):
    sound, broken = make_model("plain"), make_model("plain")
    broken.forward = types.MethodType(raising(error), broken)
    with pytest.raises(type(error)) as caught:
        SuperNet(broken)
    assert caught.value is error
    with pytest.raises(type(error)) as caught:
        check_same_outputs("save", ArtifactError, Subject(sound, sound), [Subject(broken, broken)], (3, 32, 32))
    assert caught.value is error


def test_random_numbers_stay_as_they_were():
    model = architectures.make(NAMES[3])
    torch.manual_seed(5)
    SuperNet(model)
    drawn = torch.rand(3)
    torch.manual_seed(5)
    assert torch.equal(drawn, torch.rand(3))


def test_loading_does_not_run_the_model(tmp_path, monkeypatch):
    from stratavit.models import elastic_model

    SuperNet(make_model("plain")).save(tmp_path / "net")
    monkeypatch.setattr(elastic_model, "check_same_outputs", None)
    SuperNet.load(tmp_path / "net")
