"""Folders that the version before wrote (commit 448e28a, timm 1.0.31, torch 2.14.1) load and give what they gave."""

from pathlib import Path

import torch
from safetensors.torch import load_file

import stratavit

FOLDER = Path(__file__).parent / "saved_before"


def test_a_super_network_of_the_version_before():
    net, known = stratavit.SuperNet.load(FOLDER / "run"), load_file(FOLDER / "outputs.safetensors")
    spec = net.spec(macs=0.5)
    with torch.no_grad():
        assert torch.allclose(net(known["images"]), known["full"], atol=1e-6)
        assert torch.allclose(net(known["images"], spec), known["half"], atol=1e-6)
        assert torch.allclose(net.extract(spec=spec, verbose=False)(known["images"]), known["small"], atol=1e-6)


def test_a_sub_network_of_the_version_before():
    small, known = stratavit.load(FOLDER / "small"), load_file(FOLDER / "outputs.safetensors")
    with torch.no_grad():
        assert torch.allclose(small(known["images"]), known["small"], atol=1e-6)
