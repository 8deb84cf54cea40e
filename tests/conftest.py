"""Fixtures shared by all tests, and the real weights and images that some of them need."""

from __future__ import annotations

import os
import shutil
import signal
from importlib.util import find_spec
from pathlib import Path

import pytest
import timm
import torch
from children import unmountable
from helpers import FAMILIES, copy_of, make_batches, make_images, make_model, make_net, save_both
from hypothesis import settings
from safetensors.torch import load_file

from stratavit.files import atomic
from stratavit.reports.curve import curve

settings.register_profile("stratavit", deadline=None, max_examples=20, derandomize=True, database=None)
settings.load_profile("stratavit")
torch.set_num_threads(1)
if (
    signal.getsignal(signal.SIGINT) is signal.SIG_IGN
):  # of a shell's background job; processes that tests start inherit it
    signal.signal(signal.SIGINT, signal.default_int_handler)

TESTS = Path(__file__).resolve().parent
ROOT = TESTS.parent
FAST = (  # of `make test-fast`: what must always hold, on small random models; files or single tests, seconds each
    # the code and its ground
    "test_architecture.py",
    "data/test_class_names.py",
    "data/test_feed.py",
    "data/test_image_files.py",
    "data/test_image_reading.py",
    "training/test_recipe.py",
    "test_spec.py",
    # networks: the function is kept, elastic = extracted, costs are exact
    "elastic/test_compensation.py",
    "models/test_cost.py",
    "elastic/test_elastic.py",
    "elastic/test_grouped.py",
    "elastic/test_merging.py",
    "models/test_extract.py::test_asked_got_and_range_are_printed",
    "models/test_extract.py::test_extracted_equals_elastic",
    "models/test_extract.py::test_full_size_is_bit_identical_to_the_source",
    "models/test_extract.py::test_layers_are_stock_timm_of_the_asked_width",
    "models/test_final_mean.py",
    "models/test_structure.py",
    "test_supernet.py",
    # method: coordinates, the list, budgets
    "dropout_list/test_allocation.py",
    "budgets/test_budget.py",
    "dropout_list/test_effects.py",
    "dropout_list/test_joint.py",
    "calibration/test_accumulators.py",
    "calibration/test_output_aware.py",
    "budgets/test_prices.py",
    "tasks/test_progressive.py",
    "tasks/test_sampling.py",
    "budgets/test_search.py",
    "dropout_list/test_sensitivity.py",
    "dropout_list/test_strata.py",
    "calibration/test_wpac.py",
)
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
DATA = Path(os.environ.get("STRATAVIT_DATA", ROOT.parent / "shared" / "data"))


def pytest_configure(config):
    # processes that tests start hold to the same; a filter by module would need the module's full name there
    rules = [rule for rule in config.getini("filterwarnings") if not rule.startswith("error:::")]
    os.environ["PYTHONWARNINGS"] = ",".join(rules)


@pytest.hookimpl(tryfirst=True)  # before -m looks for the marker
def pytest_collection_modifyitems(items):
    for item in items:
        real = item.get_closest_marker("real_weights") or item.get_closest_marker("browser")
        if not real and f"{item.path.relative_to(TESTS)}::{item.name}".startswith(FAST):
            item.add_marker(pytest.mark.fast)
    missing = {}
    if not DATA.is_dir():
        missing["real_weights"] = f"no real weights and images: {DATA} is not a folder; set STRATAVIT_DATA"
    if CHROMIUM is None or find_spec("playwright") is None:
        what = "chromium on the PATH" if CHROMIUM is None else "playwright: pip install 'stratavit[dev]'"
        missing["browser"] = f"no browser to look at pages with: no {what}"
    for name, reason in missing.items():
        for item in items:
            if item.get_closest_marker(name):
                item.add_marker(pytest.mark.skip(reason=reason))


def pytest_terminal_summary(terminalreporter):
    reasons = [str(r.longrepr) for r in terminalreporter.stats.get("skipped", [])]
    for part, want in (
        ("set STRATAVIT_DATA", f"real data (STRATAVIT_DATA: {DATA})"),
        ("no browser", "a browser (chromium and playwright)"),
        ("C++ compiler", "another device (a GPU, or a C++ compiler)"),
    ):
        count = sum(part in reason for reason in reasons)
        terminalreporter.write_line(f"{count} tests were skipped for want of {want}")


@pytest.fixture(scope="session", params=list(FAMILIES))
def family(request):
    """Name of a model family."""
    return request.param


@pytest.fixture
def source(family):
    """A small random model of the family, stock timm."""
    return make_model(family)


@pytest.fixture(scope="session")
def net():
    """A small super-network with a dropout list, which no test may change."""
    return make_net("plain", stratified=True)


@pytest.fixture(scope="session")
def points(net):
    """Its curve."""
    return curve(net, make_batches(), ("1", "75%", "0.5"))


@pytest.fixture(scope="session")
def root(tmp_path_factory):
    """Folders of a super-network and of a sub-network, which tests leave as they were."""
    return save_both(tmp_path_factory.mktemp("saved"))


@pytest.fixture
def saved(root, tmp_path):
    """A copy of them."""
    return copy_of(root, tmp_path)


@pytest.fixture
def batches():
    """Labelled calibration batches of unequal sizes."""
    return make_batches()


@pytest.fixture
def images():
    """Images that no calibration has seen."""
    return make_images(4, seed=9)


@pytest.fixture(scope="session")
def device():
    """A device that is not the CPU, for `devices/check_*.py` alone: torch knows it for the rest of the process."""
    if torch.cuda.is_available():
        torch.backends.cudnn.allow_tf32 = False  # convolutions of patches as precise as products
        return torch.device("cuda", 0)
    import second_device

    return second_device.register()


@pytest.fixture(scope="session", autouse=True)
def _no_power_fails():
    """Writing to the disk is not waited for, which takes most of the time of a small model's saving."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(atomic, "_sync", lambda path: None)
        yield


@pytest.fixture
def place(tmp_path):
    """A folder to mount a disk on, see `children.mounted`."""
    if unmountable():
        pytest.skip(unmountable())
    (tmp_path / "disk").mkdir()
    return tmp_path / "disk"


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


@pytest.fixture(scope="session")
def browser():
    """Chromium without a window, told not to talk to anyone."""
    from playwright.sync_api import sync_playwright

    quiet = ["background-networking", "component-update", "sync", "quic"]
    flags = ["--no-sandbox", "--disable-gpu", "--no-first-run", *(f"--disable-{name}" for name in quiet)]
    with sync_playwright() as playwright:
        launched = playwright.chromium.launch(executable_path=CHROMIUM, args=flags)
        yield launched
        launched.close()
