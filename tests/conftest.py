"""Fixtures shared by all tests, and the real weights and images that some of them need."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import timm
import torch
from helpers import FAMILIES, make_batches, make_images, make_model
from hypothesis import settings
from safetensors.torch import load_file

settings.register_profile("stratavit", deadline=None, max_examples=20, derandomize=True, database=None)
settings.load_profile("stratavit")
torch.set_num_threads(1)

ROOT = Path(__file__).resolve().parent.parent
DATA = Path(os.environ.get("STRATAVIT_DATA", ROOT.parent / "shared" / "data"))


def pytest_configure(config):
    config.addinivalue_line("markers", "real_weights: needs the weights and images in STRATAVIT_DATA")


def pytest_collection_modifyitems(items):
    if not DATA.is_dir():
        reason = f"no real weights and images: {DATA} is not a folder; set STRATAVIT_DATA"
        for item in items:
            if item.get_closest_marker("real_weights"):
                item.add_marker(pytest.mark.skip(reason=reason))


def pytest_terminal_summary(terminalreporter):
    skipped = [r for r in terminalreporter.stats.get("skipped", []) if "set STRATAVIT_DATA" in str(r.longrepr)]
    terminalreporter.write_line(f"{len(skipped)} tests were skipped for want of real data (STRATAVIT_DATA: {DATA})")


@pytest.fixture(scope="session", params=list(FAMILIES))
def family(request):
    """Name of a model family."""
    return request.param


@pytest.fixture
def source(family):
    """A small random model of the family, stock timm."""
    return make_model(family)


@pytest.fixture
def batches():
    """Labelled calibration batches of unequal sizes."""
    return make_batches()


@pytest.fixture
def images():
    """Images that no calibration has seen."""
    return make_images(4, seed=9)


@pytest.fixture(scope="session")
def real_data():
    """Folder of the real weights and images."""
    return DATA


@pytest.fixture(scope="session")
def deit_tiny():
    """The pre-trained DeiT-Tiny, stock timm."""
    model = timm.create_model("deit_tiny_patch16_224")
    model.load_state_dict(load_file(DATA / "deit_tiny_patch16_224.safetensors"), strict=True)
    return model.eval()
