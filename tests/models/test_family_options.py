"""Options of timm's constructors and half precision: taken by every family, or refused in one sentence."""

import copy

import architectures
import pytest
import timm
import torch
from architectures import SWIN, VIT
from helpers import enliven, make_images, relative_error

import stratavit
from stratavit import StrataViTError, SuperNet
from stratavit.models.architecture import difference
from stratavit.utils.model import classes_of

IMAGES = make_images(3, seed=9)
FAMILIES = (
    "vit_tiny_patch16_224",
    "eva02_tiny_patch14_224",
    "vit_small_patch16_dinov3",
    "beit_base_patch16_224",
    "swin_tiny_patch4_window7_224",
    "swinv2_tiny_window8_256",
)
OPTIONS = {
    "eva02, any image size": ("eva02_tiny_patch14_224", {"dynamic_img_size": True}),
    "eva02, no class token": ("eva02_tiny_patch14_224", {"class_token": False, "global_pool": "avg"}),
    "eva02, registers": ("eva02_tiny_patch14_224", {"num_reg_tokens": 2}),
    "eva02, patches dropped in training": ("eva02_tiny_patch14_224", {"patch_drop_rate": 0.1}),
    "swin, any image size": ("swin_tiny_patch4_window7_224", {"strict_img_size": False}),
    "swin, narrow MLPs": ("swin_tiny_patch4_window7_224", {"mlp_ratio": 2.0}),
    "swin, windows by stage": ("swin_tiny_patch4_window7_224", {"window_size": ((4, 4), (2, 2))}),
    "swin-v2, narrow MLPs": ("swinv2_tiny_window8_256", {"mlp_ratio": 2.0}),
}


def build(name, **more):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        sizes = SWIN if name.startswith("swin") else VIT
        try:
            return enliven(timm.create_model(name, **sizes | {"num_classes": 7} | more)).eval()
        except TypeError:
            if "window_size" in more:
                pytest.skip(f"timm {timm.__version__} has one window for all stages")
            raise


@pytest.mark.parametrize("option", OPTIONS)
def test_options_survive_conversion_and_files(option, tmp_path):
    name, more = OPTIONS[option]
    model = build(name, **more)
    images = make_images(4)
    net = SuperNet(model).contract([images]).eval()
    small = net.extract(spec={site.name: max(1, site.width // 2) for site in net.sites})
    stratavit.save(small, tmp_path / "small")
    net.save(tmp_path / "net")
    with torch.no_grad():
        assert relative_error(net(images), model(images)) < 2e-5
        assert torch.equal(stratavit.load(tmp_path / "small")(images), small(images))
        assert torch.equal(SuperNet.load(tmp_path / "net").eval()(images), net(images))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", FAMILIES)
def test_half_precision_goes_in_and_through_files(name, dtype, tmp_path):
    """A model in half precision is taken; networks cast to it are saved and loaded, and answer the same."""
    net = SuperNet(build(name).to(dtype)).eval()
    small = net.extract(spec={net.sites[0].name: net.sites[0].width // 2})
    net.save(tmp_path / "net")
    stratavit.save(small, tmp_path / "small")
    images = IMAGES.to(dtype)
    with torch.no_grad():
        assert torch.equal(SuperNet.load(tmp_path / "net").eval()(images), net(images))
        assert torch.equal(stratavit.load(tmp_path / "small")(images), small(images))


@pytest.mark.parametrize("name", FAMILIES)
def test_timm_loads_the_folder_of_every_family(name, tmp_path):
    net = SuperNet(build(name)).eval()
    net.save(tmp_path / "net")
    model = timm.create_model(f"local-dir:{tmp_path / 'net'}", pretrained=True).eval()
    with torch.no_grad():
        assert relative_error(model(IMAGES), net.model(IMAGES)) < 1e-5


def test_part_of_a_data_config_is_enough():
    model = build("vit_tiny_patch16_224")
    net = SuperNet(model, data_config={"mean": (0.1, 0.2, 0.3)})
    assert net.data_config["mean"] == (0.1, 0.2, 0.3)
    assert net.data_config["input_size"] == (3, 32, 32)
    with pytest.raises(StrataViTError, match="data_config: 'means' is none of crop_mode"):
        SuperNet(model, data_config={"means": (0.1, 0.2, 0.3)})


def test_a_single_output_is_a_feature():
    """One output has no cross-entropy to differentiate; channels are sorted by its square all the same."""
    model = build("vit_tiny_patch16_224", num_classes=1)
    assert classes_of(model) == 0
    net = SuperNet(model).contract([IMAGES]).eval()
    before, after = model.blocks[0].attn.qkv.weight, net.model.blocks[0].attn.qkv.weight
    assert relative_error(after.abs().sort().values, before.abs().sort().values) > 1e-3
    with torch.no_grad():
        assert relative_error(net(IMAGES), model(IMAGES)) < 2e-5


def test_torchvision_heads():
    """A head that was replaced in one of the usual ways is taken; an activation that timm does not have is refused."""
    for head in (
        torch.nn.Linear(32, 5),
        torch.nn.Sequential(torch.nn.Linear(32, 5)),
        torch.nn.Sequential(torch.nn.Dropout(0.1), torch.nn.Linear(32, 5)),
        torch.nn.Identity(),
    ):
        model = copy.deepcopy(architectures.make(architectures.TORCHVISION))
        model.heads = head
        with torch.no_grad():
            assert relative_error(stratavit.as_timm(model.eval())(IMAGES), model(IMAGES)) < 1e-5
    model.heads = torch.nn.Sequential(torch.nn.Linear(32, 8), torch.nn.Tanh(), torch.nn.Linear(8, 5))
    with pytest.raises(StrataViTError, match="one linear head"):
        stratavit.as_timm(model)
    model = copy.deepcopy(architectures.make(architectures.TORCHVISION))
    model.encoder.layers[0].mlp[1] = torch.nn.ReLU()
    with pytest.raises(StrataViTError, match="differ"):
        stratavit.as_timm(model)


def test_what_is_saved_is_not_compared():
    """Buffers that are part of the weights, as those of batch norms, may hold anything."""
    model = build("vit_tiny_patch16_224")
    model.patch_embed.norm = torch.nn.BatchNorm1d(32)
    built = copy.deepcopy(model)
    built.patch_embed.norm.running_mean += 1
    assert difference(built, model) is None
