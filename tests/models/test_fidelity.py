"""What a model computes beside its weights and arguments is never lost without a word: hooks, methods, subclasses."""

import copy
import types

import architectures
import pytest
import torch
from helpers import make_images, make_model, relative_error
from timm.models.vision_transformer import VisionTransformer
from torch import nn

import stratavit
from stratavit import ArtifactError, StrataViTError, SuperNet, UnsupportedModelError
from stratavit.models.equality import Subject, check_equal

NAMES = ("vit_tiny_patch16_224", "eva02_tiny_patch14_224", "beit_base_patch16_224")
SWINS = ("swin_tiny_patch4_window7_224", "swinv2_tiny_window8_256")
SIZES = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2, "num_classes": 7}


def turned_after(module, args, out):
    return out.roll(1, -1)  # norms do not undo it


def turned_before(module, args):
    return (args[0].roll(1, -1), *args[1:])


def blocks_of(model):
    return next(name for name, module in model.named_modules() if hasattr(module, "attn") and name)


def hook(model, name, pre=False):
    module = model.get_submodule(name)
    (module.register_forward_pre_hook(turned_before) if pre else module.register_forward_hook(turned_after))
    return name


def overridden(model, name, method="forward"):
    """As ``module.forward = ...`` does; the old one is still that of this object."""
    module = model.get_submodule(name)
    old = getattr(module, method)
    setattr(module, method, lambda *args, **kwargs: old(*args, **kwargs).roll(1, -1))
    return name


PARTS = ("{}.attn", "{}.mlp", "{}.attn.proj", "{}.mlp.fc2", "{}.norm1", "{}", "patch_embed", "")
WAYS = {
    "hook": hook,
    "pre-hook": lambda model, name: hook(model, name, pre=True),
    "forward": overridden,
}
FUNCTIONAL = {"eva02_tiny_patch14_224": "{}.mlp.fc1", "vit_tiny_patch16_224": "{}.attn.qkv"}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("name", [*NAMES, *SWINS])
def test_what_is_not_in_weights_is_refused_by_name(name, part, way):
    model = architectures.make(name)
    where = WAYS[way](model, part.format(blocks_of(model)))
    with pytest.raises(UnsupportedModelError) as caught:
        SuperNet(model)
    assert f": {where} (" in str(caught.value) if where else "the model itself (" in str(caught.value)


@pytest.mark.parametrize("name", FUNCTIONAL)
def test_adapters_on_layers_whose_weights_alone_are_used(name):
    model = architectures.make(name)
    where = hook(model, FUNCTIONAL[name].format(blocks_of(model)))
    with pytest.raises(UnsupportedModelError, match=where):
        SuperNet(model)


@pytest.mark.parametrize("method", ["forward_head", "pool", "_pos_embed", "forward_features"])
def test_methods_of_the_model_itself(method):
    model = make_model("plain")
    overridden(model, "", method)
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
        with pytest.raises(UnsupportedModelError, match=f"{method} of the class Own"):
            SuperNet(model)
    else:  # computes what timm's does
        with torch.no_grad():
            assert relative_error(SuperNet(model)(make_images(2)), model(make_images(2))) < 1e-5


def test_a_head_of_zeros_hides_nothing():
    model = make_model("plain")
    hook(model, "blocks.0")
    nn.init.zeros_(model.head.weight)
    with pytest.raises(UnsupportedModelError, match=r"blocks\.0 \(a hook\)"):
        SuperNet(model)


@pytest.mark.parametrize("name", [*NAMES, *SWINS])
def test_what_only_looks_on_stays(name):
    model, seen = architectures.make(name), []
    for module in (model, model.get_submodule(blocks_of(model)), model.get_submodule(blocks_of(model)).attn):
        module.register_forward_hook(lambda module, args, out: seen.append(out.shape))
        module.register_forward_pre_hook(lambda module, args: None)
    net = SuperNet(model).eval()
    with torch.no_grad():
        assert relative_error(net(make_images(2)), model(make_images(2))) < 1e-5
    assert seen


def test_methods_set_on_instances_that_change_nothing_do_not_lead_to_the_source(tmp_path):
    """``forward`` of the copy would be that of the source, whose widths are always full."""
    model = make_model("plain")
    for name in ("", "blocks.0", "blocks.0.attn", "blocks.1.mlp"):
        module = model.get_submodule(name)
        old = module.forward
        module.forward = lambda *args, old=old, **kwargs: old(*args, **kwargs)
    net = SuperNet(model).eval()
    spec = {"blocks.0.attn": 8, "blocks.1.mlp": 2}
    small = net.extract(spec=spec, verbose=False)
    stratavit.save(small, tmp_path / "small")
    images = make_images(2)
    with torch.no_grad():
        assert relative_error(net(images, spec), small(images)) < 1e-5
        assert relative_error(net(images), small(images)) > 1e-2
        assert relative_error(stratavit.load(tmp_path / "small")(images), small(images)) == 0


@pytest.mark.parametrize("change", [lambda m: hook(m, "blocks.1.mlp"), lambda m: overridden(m, "", "pool")])
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


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", architectures.NAMES)
def test_sound_models_pass_in_every_type(name, dtype):
    model = architectures.make(name)
    SuperNet(model.to(dtype))
    with pytest.raises(StrataViTError):
        SuperNet(model.register_forward_hook(turned_after) and model)


def test_answers_that_are_no_numbers():
    model = make_model("plain")
    model.register_forward_hook(lambda module, args, out: out * float("inf"))
    with pytest.raises(UnsupportedModelError, match="NaN or infinite"):
        SuperNet(model)
    model = make_model("plain")
    model.forward = types.MethodType(lambda self, x: {"logits": x}, model)
    with pytest.raises(UnsupportedModelError, match="answers with a dict"):
        SuperNet(model)
    model.forward = types.MethodType(lambda self, x: 1 / 0, model)
    with pytest.raises(UnsupportedModelError, match="ZeroDivisionError"):
        SuperNet(model)
    model.forward = types.MethodType(lambda self, x: [].pop() if x.requires_grad else x.new_zeros(1, 3), model)
    with pytest.raises(UnsupportedModelError):
        SuperNet(model)


def test_answers_of_another_shape():
    model = make_model("plain")
    model.register_forward_hook(lambda module, args, out: out[:, :3])
    with pytest.raises(UnsupportedModelError, match="inf"):
        SuperNet(model)


def test_modules_that_are_called_by_keyword_are_named_too():
    model = make_model("plain")
    old = model.blocks[0].forward
    model.blocks[0].forward = lambda x: old(x.roll(1, -1))

    def forward_features(images, **options):
        tokens = model._pos_embed(model.patch_embed(images))
        for block in model.blocks:
            tokens = block(x=tokens)
        return model.norm(tokens)

    model.forward_features = forward_features
    with pytest.raises(UnsupportedModelError, match=r"blocks\.0 \(forward of its own\)"):
        SuperNet(model)


def test_want_of_memory_is_told_as_it_is():
    model = make_model("plain")

    def full(*args):
        raise MemoryError

    model.forward = full
    with pytest.raises(MemoryError):
        SuperNet(model)
    sound = make_model("plain")
    broken = copy.deepcopy(sound)
    broken.forward = lambda *args: (_ for _ in ()).throw(RuntimeError("CUDA out of memory"))
    with pytest.raises(RuntimeError, match="out of memory"):
        check_saved(Subject(sound, sound), broken, (3, 32, 32))
    broken.forward = lambda *args: (_ for _ in ()).throw(RuntimeError("shapes"))
    with pytest.raises(ArtifactError, match="RuntimeError: shapes"):
        check_saved(Subject(sound, sound), broken, (3, 32, 32))


def test_random_numbers_are_left_as_they_were():
    model = architectures.make("swin_tiny_patch4_window7_224")
    torch.manual_seed(5)
    SuperNet(model)
    drawn = torch.rand(3)
    torch.manual_seed(5)
    assert torch.equal(drawn, torch.rand(3))


def test_loading_does_not_run_the_model(tmp_path, monkeypatch):
    from stratavit import supernet

    SuperNet(make_model("plain")).save(tmp_path / "net")
    monkeypatch.setattr(supernet, "check_equal", None)
    SuperNet.load(tmp_path / "net")
