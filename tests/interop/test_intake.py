"""Models that other tools or their owners have changed: accepted as they are, or refused at once in a sentence."""

import copy
import threading
import warnings

import architectures
import pytest
import torch
from accelerate import cpu_offload
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from helpers import PLAN, make_batches, make_images, make_model, make_net, relative_error
from timm.utils import ModelEmaV3
from torch import nn
from torch.nn.utils import parametrizations, prune, weight_norm
from torch.optim.swa_utils import AveragedModel

import stratavit
from stratavit import ArtifactError, StrataViTError, SuperNet, UnsupportedModelError
from stratavit.models import source_checks
from stratavit.models.cost import linear_macs

SWIN = "swin_tiny_patch4_window7_224"
SPEC = {"blocks.0.attn": 8, "blocks.1.mlp": 8}
IMAGES = make_images(2)


def close(one, other, *spec):
    """Whether two models compute the same, the second maybe at a spec."""
    with torch.no_grad():
        return relative_error(one(IMAGES), other(IMAGES, *spec)) < 1e-5


def changed_net():
    return copy.deepcopy(make_net("plain"))


class Lora(nn.Module):
    """As peft puts it in the place of a linear layer."""

    def __init__(self, layer):
        super().__init__()
        self.base_layer, self.lora_A, self.lora_B = layer, nn.Linear(32, 2), nn.Linear(2, layer.out_features)
        self.in_features, self.out_features, self.weight, self.bias = layer.in_features, layer.out_features, None, None

    def forward(self, x):
        return self.base_layer(x) + self.lora_B(self.lora_A(x))


class Own(nn.Linear):
    pass


class Subtype(torch.Tensor):
    pass


def quantised(model):
    return torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, torch.qint8)


def nothing_but_buffers(model):
    for module in model.modules():
        for name in list(module._parameters):
            module.register_buffer(name, module._parameters.pop(name))


def at(name, layer):
    """Puts another layer in the place of one."""

    def put(model):
        owner, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(owner), leaf, layer(model.get_submodule(name)))

    return put


def weights(change):
    """Puts another tensor in the place of the head's weights."""
    return lambda m: setattr(m.head, "weight", nn.Parameter(change(m.head.weight.detach()), requires_grad=False))


CHANGES = {  # what was done, and what the sentence says to do
    "pruning": (lambda model: prune.l1_unstructured(model.blocks[0].attn.qkv, "weight", 0.5), "prune.remove"),
    "weight norm": (lambda model: weight_norm(model.blocks[0].attn.proj), "remove_weight_norm"),
    "spectral norm": (lambda model: nn.utils.spectral_norm(model.blocks[0].mlp.fc2), "norm"),
    "parametrization": (lambda m: parametrizations.weight_norm(m.blocks[0].attn.qkv), "remove_parametrizations"),
    "LoRA": (at("blocks.0.attn.qkv", Lora), "merge_and_unload"),
    "other layers": (at("blocks.0.attn.proj", lambda layer: Own(32, 32)), "blocks.0.attn.proj"),
    "eps": (at("blocks.1.norm1", lambda layer: nn.LayerNorm(32, eps=1e-2)), "eps=1e-06"),
    "activation": (at("blocks.1.mlp.act", lambda layer: nn.ReLU()), "GELU"),
    "compiled block": (lambda model: model.blocks.__setitem__(0, torch.compile(model.blocks[0])), "_orig_mod"),
    "offloaded": (lambda model: cpu_offload(model, torch.device("cpu")), "no storage"),
    "integers": (weights(lambda tensor: tensor.to(torch.int8)), "quantised"),
    "quantised": (quantised, "quantised"),
    "no weights": (nothing_but_buffers, "weights"),
    "sparse": (weights(lambda tensor: tensor.to_sparse()), "dense"),
    "a tensor of another library": (weights(lambda tensor: tensor.as_subclass(Subtype)), "plain tensor"),
    "NaN in a buffer": (lambda model: model.register_buffer("x", torch.tensor(float("nan"))), "NaN"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_other_tools_left_is_refused_at_once(change, tmp_path):
    model, (apply, words) = make_model("plain"), CHANGES[change]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # older ways of torch say that they are old
        made = apply(model)
    model = made if change == "quantised" else model
    for use in (SuperNet, lambda model: stratavit.save(model, tmp_path / "x")):
        with pytest.raises(StrataViTError) as caught:
            use(model)
        assert words in str(caught.value)
        assert "\n" not in str(caught.value)
    assert not (tmp_path / "x").exists()


def test_layers_of_other_libraries_are_looked_at_too():
    model = architectures.make("ViTForImageClassification")
    prune.l1_unstructured(model.vit.layers[0].mlp.fc1, "weight", 0.5)
    with pytest.raises(UnsupportedModelError, match=r"prune\.remove"):
        SuperNet(model)


def test_weights_on_several_devices_are_refused(monkeypatch):
    model = make_model("plain")
    model.head.to("meta")  # the only other device that is always here
    monkeypatch.setattr(source_checks, "_check_storage", lambda name, tensor: None)
    monkeypatch.setattr(torch.Tensor, "isfinite", lambda tensor: torch.ones(1))
    with pytest.raises(UnsupportedModelError, match=r"\(cpu, meta\)"):
        source_checks.check_weights(model)


def test_what_was_merged_or_made_permanent_is_accepted():
    """What is left after `merge_and_unload`, `prune.remove` and their like are plain layers."""
    model = make_model("plain")
    prune.l1_unstructured(model.blocks[0].attn.qkv, "weight", 0.5)
    prune.remove(model.blocks[0].attn.qkv, "weight")
    parametrizations.weight_norm(model.blocks[0].mlp.fc1)
    nn.utils.parametrize.remove_parametrizations(model.blocks[0].mlp.fc1, "weight")
    assert close(SuperNet(model), model)


def test_hooks_that_only_move_tensors_are_accepted(tmp_path):
    model = make_model("plain")
    for module in (model.blocks[0].attn, model):
        add_hook_to_module(module, AlignDevicesHook(torch.device("cpu")))
    net = SuperNet(model).eval()
    small = net.extract(spec=SPEC, verbose=False)
    stratavit.save(small, tmp_path / "small")
    assert close(small, net, SPEC)


# ---- wrappers ---------------------------------------------------------------------------------------------------


def two(model):
    return nn.DataParallel(torch.compile(model))


@pytest.mark.parametrize("wrap", [two, AveragedModel, ModelEmaV3])
def test_wrappers_are_removed(wrap, tmp_path):
    model = make_model("plain")
    wrapped = wrap(model)
    net = SuperNet(wrapped).eval()
    stratavit.save(wrapped, tmp_path / "dense")
    assert close(net, model)
    assert close(stratavit.load(tmp_path / "dense"), model)
    with pytest.raises(ArtifactError, match="super-network"):
        stratavit.save(wrap(net), tmp_path / "net")


def test_models_in_models_and_of_others():
    class VisionTransformer(nn.Module):
        __module__ = "open_clip.transformer"

    hooked = nn.DataParallel(make_model("plain"))
    hooked.register_forward_hook(doubled)
    holder = nn.Module()
    holder.net = nn.ModuleDict({"encoder": make_model("plain")})
    adapted = type("PeftModel", (nn.Module,), {"__module__": "peft.peft_model"})()
    adapted.base_model = make_model("plain")
    for model, words in (
        (hooked, r"model\.module"),
        (holder, r"model\.net\.encoder"),
        (VisionTransformer(), r"open_clip\.transformer\.VisionTransformer"),
        (adapted, "merge_and_unload"),
    ):
        with pytest.raises(UnsupportedModelError, match=words):
            SuperNet(model)


# ---- super-networks that their owners change --------------------------------------------------------------------

CHANGED = {
    "no head": (lambda model: model.reset_classifier(0), 32),
    "another head": (lambda model: setattr(model, "head", nn.Sequential(nn.Dropout(0.2), nn.Linear(32, 5))), 32),
    "image size": (lambda model: model.set_input_size(img_size=64), 64),
    "patch size": (lambda model: model.set_input_size(patch_size=16), 32),
}


@pytest.mark.parametrize("change", CHANGED)
def test_changes_that_are_followed(change, tmp_path):
    """Cost, files and extracted models are those of a super-network of the changed model."""
    net = copy.deepcopy(make_net("plain", stratified=True))
    apply, side = CHANGED[change]
    apply(net.model)
    spec = {"blocks.0.attn": 8, "blocks.1.mlp": 0}
    small = net.extract(spec=spec, verbose=False)
    assert net.macs(spec) == linear_macs(small, (3, side, side))
    assert net.params(spec) == sum(p.numel() for p in small.parameters())
    assert net.data_config["input_size"] == (3, side, side)
    assert 0.7 * net.macs() < net.budget(macs=0.8).got <= 0.8 * net.macs()
    net.save(tmp_path / "net")
    stratavit.save(small, tmp_path / "small")
    images = torch.randn(2, 3, side, side)
    read = SuperNet.load(tmp_path / "net").eval()
    with torch.no_grad():
        assert relative_error(read(images, spec), net(images, spec)) < 1e-5
        assert relative_error(stratavit.load(tmp_path / "small")(images), small(images)) < 1e-5
    assert (read.macs(), read.params()) == (net.macs(), net.params())
    assert net.stratify([torch.randn(4, 3, side, side)] * 3, plan=PLAN).strata is not None


def doubled(module, args, out):
    return 2 * out


TURNED = {  # what makes the outputs of a super-network differ from those of what can be cut out of it
    "hook of a site, by keyword": lambda net: net.model.blocks[1].mlp.register_forward_pre_hook(
        lambda module, args, kwargs: ((2 * args[0],), kwargs), with_kwargs=True
    ),
    "hook of the last norm": lambda net: net.model.norm.register_forward_hook(doubled),
    "hook of the super-network": lambda net: net.register_forward_hook(doubled),
    "forward of a site": lambda net: setattr(net.model.blocks[0].attn, "forward", lambda x, **options: 2 * x),
    "LoRA": lambda net: at("blocks.0.attn.qkv", Lora)(net.model),
    "pruning": lambda net: prune.l1_unstructured(net.model.blocks[0].mlp.fc1, "weight", 0.5),
    "fewer blocks": lambda net: setattr(net.model, "blocks", net.model.blocks[:1]),
}


@pytest.mark.parametrize("turn", TURNED)
def test_no_small_model_is_cut_whose_outputs_would_differ(turn, tmp_path):
    net = changed_net()
    TURNED[turn](net)
    for use in (
        lambda: net.extract(spec={}, verbose=False),
        lambda: net.extract(spec=SPEC, verbose=False),
        lambda: net.save(tmp_path / "net"),
    ):
        with pytest.raises(StrataViTError) as caught:
            use()
        assert "\n" not in str(caught.value)


def half_resized(model):
    with pytest.raises(AttributeError):
        model.set_input_size(img_size=64)


@pytest.mark.parametrize(
    ("name", "apply"),
    [
        ("vit_tiny_patch16_224", lambda model: setattr(model, "head", nn.Linear(8, 3))),
        ("vit_tiny_patch16_224", lambda model: setattr(model, "pos_embed", nn.Parameter(torch.zeros(1, 99, 32)))),
        (SWIN, half_resized),
    ],
)
def test_changes_that_cannot_be_followed_are_refused_everywhere(name, apply, tmp_path):
    net = SuperNet(architectures.make(name)).contract([torch.randn(4, 3, 32, 32)] * 2)
    net.stratify([torch.randn(4, 3, 32, 32)] * 2, plan=PLAN)
    apply(net.model)
    before = net.description
    for use in (
        lambda: net.macs(),
        lambda: net.params(),
        lambda: net.budget(macs=0.8),
        lambda: net.extract(spec={}, verbose=False),
        lambda: net.save(tmp_path / "net"),
    ):
        with pytest.raises(StrataViTError):
            use()
    assert net.description is before
    assert not (tmp_path / "net").exists()


def test_windows_of_another_size_are_saved(tmp_path):
    small = SuperNet(architectures.make(SWIN)).extract(spec={"layers.0.blocks.0.attn": 4}, verbose=False)
    small.set_input_size(img_size=64)
    images = torch.randn(2, 3, 64, 64)
    stratavit.save(small, tmp_path / "small")
    with torch.no_grad():
        assert relative_error(stratavit.load(tmp_path / "small")(images), small(images)) < 1e-5


ADDED = {  # what was put into a model or a super-network later, and what the sentence names
    "a lock": (lambda model: setattr(model, "lock", threading.Lock()), "lock does not"),
    "an output with its graph": (lambda m: setattr(m.blocks[1], "saved", m(IMAGES)), r"blocks\.1\.saved does not"),
    "one tensor in two places": (
        lambda model: setattr(model.blocks[1].mlp.fc1, "weight", model.blocks[0].mlp.fc1.weight),
        r"blocks\.0\.mlp\.fc1\.weight and blocks\.1",
    ),
    "a buffer": (lambda model: model.register_buffer("x", torch.zeros(3)), r"\bx\b"),
}


@pytest.mark.parametrize("added", ADDED)
def test_what_cannot_be_copied_or_cut_is_named(added, tmp_path):
    (add, words), model, net = ADDED[added], make_model("plain"), changed_net()
    add(model), add(net.model)
    uses = [lambda: SuperNet(model)]
    if "does not" in words:
        uses += [lambda: net.extract(spec={}, verbose=False), net.source_copy]
    else:
        uses += [lambda: stratavit.save(model, tmp_path / "x"), lambda: net.save(tmp_path / "x")]
    for use in uses:
        with pytest.raises(StrataViTError, match=words):
            use()


def test_weights_in_one_memory_are_saved(tmp_path):
    model = make_model("plain")
    model.blocks[1].norm1.weight = nn.Parameter(model.blocks[0].norm1.weight.data)
    stratavit.save(model, tmp_path / "x")
    assert stratavit.load(tmp_path / "x").blocks[1].norm1.weight.equal(model.blocks[0].norm1.weight)


def test_weights_of_inference_mode():
    """Serving may do everything in it; what needs gradients refuses them; small models can be trained."""
    net = make_net("plain")
    with torch.inference_mode():
        served = SuperNet(make_model("plain")).eval()
        assert served.extract(spec=SPEC, verbose=False)(IMAGES).isfinite().all()
        model = make_model("plain")
        small = net.extract(spec=SPEC, verbose=False)
    small(IMAGES).sum().backward()
    assert all(parameter.grad is not None for parameter in small.blocks.parameters())
    for use in (lambda: SuperNet(model), lambda: served.contract(make_batches())):
        with pytest.raises(StrataViTError, match="outside"):
            use()
