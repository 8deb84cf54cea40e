"""Runs `check_*.py` on a GPU, or else on a device of our own, see second_device.cpp."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import second_device
import torch
from children import ENVIRONMENT

FOLDER = Path(__file__).parent
NEEDED = torch.cuda.is_available() or shutil.which(second_device.compiler()[0])


@pytest.mark.skipif(not NEEDED, reason="without a GPU, a C++ compiler must make the second device")
def test_networks_work_on_another_device_than_the_cpu():
    """In a process of its own: torch knows the device for the rest of it, and other tests make one up."""
    options = ["-o", "python_files=check_*.py", "-q", "-p", "no:cacheprovider"]
    ended = subprocess.run(
        [sys.executable, "-m", "pytest", *options, str(FOLDER)],
        cwd=FOLDER.parents[1],
        env=ENVIRONMENT | {"PYTEST_ADDOPTS": ""},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr
