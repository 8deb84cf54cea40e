"""What is said to be supported is what the models themselves allow."""

import json
from pathlib import Path

import architectures
import pytest
import timm
import torch
from helpers import CLASSES, relative_error

import stratavit
from stratavit import StrataViTError, SuperNet
from stratavit.cli.parser import main
from stratavit.interop import supported
from stratavit.interop.supported import EXAMPLES, markdown, rows, support_of

DOCS = Path(__file__).parents[2] / "docs"
SIZES = {"depth": 1, "embed_dim": 96, "num_heads": 2}
SWIN = {"depths": (1, 1, 1, 1), "embed_dim": 32, "num_heads": (1, 2, 4, 8)}


def test_the_table_of_the_docs_is_generated():
    assert markdown(rows()) in (DOCS / "models.md").read_text()


OWN_SIZES = architectures.STAGED | architectures.WHOLE  # of families that do not take `SIZES`


def test_degrees_and_reasons(monkeypatch):
    assert support_of("vit_tiny_patch16_224")[2:] == ("q, k, v", "yes", "")
    assert support_of("vit_small_patch16_dinov3").attention == "q, k by pairs, v"
    assert "norm between fc1 and fc2" in support_of("eva02_base_patch14_224").reason
    assert "ResNet" in support_of("resnet18").reason
    with pytest.raises(StrataViTError, match="nothing"):
        rows("nothing")
    monkeypatch.setattr(supported, "cost_model", lambda *args: 1 / 0)
    assert "division by zero" in support_of("vit_small_patch32_224").reason


@pytest.mark.parametrize("name", EXAMPLES.values())
def test_what_is_promised_is_accepted(name):
    """Of every example a small model with random weights."""
    kin = (sizes for other, sizes in OWN_SIZES.items() if other.split("_")[0] == name.split("_")[0])
    model = timm.create_model(name, **(SWIN if name.startswith("swin") else next(kin, SIZES))).eval()
    said = support_of(name)
    if "uncut" == said.attention == said.mlp:
        with pytest.raises(StrataViTError):
            SuperNet(model)
        return
    kinds = {site.kind for site in SuperNet(model).sites}
    assert ("attention" in kinds, "mlp" in kinds) == (said.attention != "uncut", said.mlp != "uncut")


@pytest.mark.parametrize("name", ["vit_tiny_r_s16_p8_224", "vit_base_resnet26d_224"])
def test_hybrids(name, tmp_path):
    """A convolutional stem is counted, kept and read by timm."""
    torch.manual_seed(0)
    model = timm.create_model(name, img_size=64, num_classes=CLASSES, **SIZES).eval()
    net, images, spec = SuperNet(model).eval(), torch.randn(2, 3, 64, 64), {"blocks.0.attn": 8, "blocks.0.mlp": 40}
    small = net.extract(spec=spec, verbose=False)
    for one, widths in ((model, None), (small, spec)):
        assert net.params(widths) == sum(p.numel() for p in one.parameters())
        assert net.macs(widths) == stratavit.models.cost.linear_macs(one, net.data_config["input_size"])
    stratavit.save(small, tmp_path / "small")
    net.save(tmp_path / "net")
    with torch.no_grad():
        assert relative_error(SuperNet.load(tmp_path / "net").eval()(images), model(images)) < 1e-5
        assert relative_error(stratavit.load(tmp_path / "small")(images), net(images, spec)) < 1e-5
    config = json.loads((tmp_path / "net" / "config.json").read_text())
    assert config["pretrained_cfg"]["first_conv"].startswith("patch_embed.backbone")


def test_hybrids_of_one_channel():
    model = timm.create_model("vit_tiny_r_s16_p8_224", img_size=64, in_chans=1, **SIZES)
    assert SuperNet(model).data_config["input_size"] == (1, 64, 64)


def test_the_command(capsys):
    assert main(["models", "vit_small*dinov3", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["models"]
    assert {row["attention"] for row in found} == {"q, k by pairs, v"}
    for form in ([], ["--markdown"]):
        assert main(["models", "deit_tiny_patch16_224", *form]) == 0
        assert "q, k, v" in capsys.readouterr().out
