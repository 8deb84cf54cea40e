"""The whole suite on the oldest, the usual and the newest versions: `make test-matrix`."""

from __future__ import annotations

import os
from pathlib import Path

import nox
from packaging.requirements import Requirement
from packaging.version import Version

PROJECT = nox.project.load_toml("pyproject.toml")["project"]
EXTRAS = PROJECT["optional-dependencies"]
USED = ("demo", "export", "train", "transformers", "lightning")  # extras that users of the package install
TOOLS = [name for name in EXTRAS["dev"] if not name.startswith(("stratavit", "ruff", "mypy"))]  # none for the site
RECORD = "benchmarks/version_matrix.py"

nox.options.default_venv_backend = "venv"
nox.options.sessions = ["oldest", "usual", "newest", "table"]
nox.options.stop_on_first_error = False
nox.options.error_on_missing_interpreters = True  # a session that is skipped would look like one that passed


@nox.session(python="3.10")
def oldest(session: nox.Session) -> None:
    """Every package at the lower bound that pyproject.toml declares, on the oldest Python."""
    session.install("--upgrade", "pip")  # the one that comes with Python 3.10 looks for versions without end
    session.install(*floors(USED), *TOOLS)
    session.install("--no-deps", "--force-reinstall", ".")
    suite(session, "oldest")


@nox.session(python="3.13")
def newest(session: nox.Session) -> None:
    """The newest of everything that pip finds."""
    session.install("--upgrade", "--upgrade-strategy", "eager", ".[dev]")
    session.install("--no-deps", "--force-reinstall", ".")
    suite(session, "newest")


@nox.session(python=False)
def usual(session: nox.Session) -> None:
    """The environment of `make test`, as it is."""
    suite(session, "usual", python=os.environ.get("VENV", ".venv") + "/bin/python")


@nox.session(python=False)
def table(session: nox.Session) -> None:
    """Writes the dated table of what the other sessions found."""
    python = os.environ.get("VENV", ".venv") + "/bin/python"
    session.run(python, RECORD, "table", str(records(session)), external=True)


def floors(extras: tuple[str, ...]) -> list[str]:
    """The declared lower bounds as pins; the highest where a package is declared twice."""
    lowest: dict[str, Version] = {}
    for text in [*PROJECT["dependencies"], *(text for extra in extras for text in EXTRAS[extra])]:
        wanted = Requirement(text)
        bounds = [Version(part.version) for part in wanted.specifier if part.operator == ">="]
        if len(bounds) != 1:
            raise ValueError(f"pyproject.toml: expected one lower bound (>=) for {wanted.name}, got {text!r}")
        lowest[wanted.name] = max(bounds[0], lowest.get(wanted.name, bounds[0]))
    return [f"{name}=={version}" for name, version in lowest.items()]


def records(session: nox.Session) -> Path:
    """Folder of what the sessions found."""
    return Path(session.cache_dir).resolve() / "test-matrix"


def suite(session: nox.Session, name: str, python: str = "python") -> None:
    """Runs the tests, notes versions and counts, then fails if a test did."""
    stem = records(session) / name
    stem.parent.mkdir(parents=True, exist_ok=True)
    report = stem.with_suffix(".xml")
    for old in (report, stem.with_suffix(".json")):
        old.unlink(missing_ok=True)
    how = session.posargs or ["-n", "auto", "--dist", "loadfile"]
    run = [python, "-m", "pytest", "-q", *how, "--junitxml", str(report)]
    session.run(*run, success_codes=[0, 1], external=True)
    session.run(python, RECORD, "record", name, str(report), external=True)
