"""What is declared, what is shipped, and what works with the core dependencies alone."""

import ast
import contextlib
import fnmatch
import importlib.util
import io
import json
import os
import re
import subprocess
import sys
import tarfile
import zipfile
from importlib.metadata import packages_distributions, requires
from pathlib import Path

import pytest
from helpers import stopped_after_rename
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from stratavit.training.recipe import read_toml

ROOT = Path(__file__).parents[1]
SOURCES = sorted((ROOT / "src").rglob("*.py"))
PYPROJECT = read_toml(ROOT / "pyproject.toml")
CORE = PYPROJECT["project"]["dependencies"]
EXTRAS = PYPROJECT["project"]["optional-dependencies"]
# extras that the package itself imports from
OURS = ("demo", "export", "openvino", "train", "transformers", "lightning", "datasets")
BROUGHT = {"torchvision": "timm"}  # not declared: comes with a dependency
ANY_VERSION = {"hatchling"}  # a build in isolation takes the newest
TOOLS = [line for line in (ROOT / "release/requirements.txt").read_text("utf-8").splitlines() if line[0] != "#"]


def load(name):
    spec = importlib.util.spec_from_file_location(f"release_{name}", ROOT / "release" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


make = load("make")
DISTRIBUTIONS = packages_distributions()


def names(requirements):
    return {canonicalize_name(Requirement(text).name) for text in requirements}


def brought_by(extra):
    """Distributions of an extra, and of those that it includes."""
    found = set()
    for one in map(Requirement, EXTRAS[extra]):
        inside = [brought_by(other) for other in one.extras] if one.name == "stratavit" else []
        found |= set().union(*inside) if inside else {canonicalize_name(one.name)}
    return found


# ---- dependencies ---------------------------------------------------------------------------------


def every_requirement():
    found = [*CORE, *PYPROJECT["build-system"]["requires"], *(line.partition("#")[0].strip() for line in TOOLS)]
    found += [text for texts in EXTRAS.values() for text in texts]
    return [text for text in found if not text.startswith("stratavit[")]


def bounds(text, *operators):
    return [part for part in Requirement(text).specifier if part.operator in operators]


def test_every_dependency_has_a_lower_bound_or_a_reason_for_none():
    free = {Requirement(text).name for text in every_requirement() if not bounds(text, ">=", ">", "==", "~=")}
    assert free <= ANY_VERSION


def test_no_dependency_has_an_upper_bound_without_a_comment():
    lines = [*(ROOT / "pyproject.toml").read_text("utf-8").splitlines(), *TOOLS]
    for text in every_requirement():
        if bounds(text, "<", "<=", "==", "===", "~=", "!="):
            (place,) = (number for number, line in enumerate(lines) if text in line)
            said = lines[place - 1].lstrip().startswith("#") or "#" in lines[place].partition(text)[2]
            assert said, f"{text}: say why, in a comment on its line or above it"


def imports(path):
    """Third-party distributions that a module imports, and whether outside of functions."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
    later = {id(inner) for node in functions for inner in ast.walk(node)}
    for node in ast.walk(tree):
        modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom):
            modules = [node.module]
        for module in {name.partition(".")[0] for name in modules} - {"stratavit", "tomllib", *sys.stdlib_module_names}:
            (distribution, *_) = DISTRIBUTIONS.get(module, [module])
            yield canonicalize_name(distribution), id(node) not in later


@pytest.fixture(scope="module")
def imported():
    found = {path: set(imports(path)) for path in SOURCES}
    assert {("torch", True), ("scikit-learn", False)} <= set().union(*found.values())
    return found


def test_what_is_imported_is_what_is_declared(imported):
    """Outside of functions the core dependencies alone, inside also those of extras; and none is declared in vain."""
    ours = set().union(*map(brought_by, OURS))
    for path, found in imported.items():
        assert {name for name, at_once in found if at_once} <= names(CORE), path.name
        assert {name for name, _ in found} <= names(CORE) | ours | set(BROUGHT), path.name
    by_accelerate = {"tensorboard"}  # a tracker
    assert names(CORE) | ours <= by_accelerate | {name for found in imported.values() for name, _ in found}
    for name, bringer in BROUGHT.items():
        assert name in names(requires(bringer))


def test_a_module_that_imports_from_an_extra_names_it(imported):
    """In the sentence that a user without it reads."""
    for path, found in imported.items():
        text = path.read_text(encoding="utf-8")
        named = {extra for extra in OURS if f"pip install 'stratavit[{extra}]'" in text}
        needed = {name for name, _ in found} & set().union(*map(brought_by, OURS)) - names(CORE)
        assert needed <= set().union(*map(brought_by, named)), path.name


def test_with_core_dependencies_alone_the_main_job_works_and_the_rest_names_its_extra(tmp_path):
    """The smoke test of a release, here with the extras hidden from a process that has them."""
    code = f"""
import contextlib, io, runpy, subprocess, sys
smoke = runpy.run_path({str(ROOT / "release/smoke.py")!r})
sys.modules.update(dict.fromkeys(smoke["EXTRAS"]))  # importing them fails
import torch
torch.set_num_threads(1)
from stratavit.cli.parser import main

def command(*arguments):
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()) as error:
        code = main(arguments)
    return subprocess.CompletedProcess(arguments, code, out.getvalue(), error.getvalue())

for name in ("works", "tells"):
    smoke[name].__globals__["command"] = command
    smoke[name]()
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == 6


def test_the_smoke_test_hides_every_extra():
    hidden = {canonicalize_name(DISTRIBUTIONS[module][0]) for module in load("smoke").EXTRAS}
    assert hidden == set().union(*map(brought_by, OURS)) - names(CORE)


# ---- what is shipped ------------------------------------------------------------------------------


def committed():
    """Files of the repository; in an unpacked sdist, which has no history, all but what is ignored and its own."""
    if (ROOT / ".git").exists():
        return subprocess.check_output(["git", "ls-files"], cwd=ROOT, text=True).splitlines()
    ignored = [*(ROOT / ".gitignore").read_text().replace("/", "").split(), "PKG-INFO"]
    found = []
    for folder, inner, files in os.walk(ROOT):
        inner[:] = [name for name in inner if not any(fnmatch.fnmatch(name, pattern) for pattern in ignored)]
        found += [str((Path(folder) / name).relative_to(ROOT)) for name in files if name not in ignored]
    return found


def test_the_sdist_holds_all_that_is_committed():
    """So tests and documentation run from it; `make release` compares file by file."""
    included = {entry.strip("/") for entry in PYPROJECT["tool"]["hatch"]["build"]["targets"]["sdist"]["include"]}
    assert included == {path.partition("/")[0] for path in committed()}


def test_the_wheel_holds_the_package_with_its_types_and_pages():
    assert PYPROJECT["tool"]["hatch"]["build"]["targets"]["wheel"] == {"packages": ["src/stratavit"]}
    package = {path.removeprefix("src/stratavit/") for path in committed() if path.startswith("src/")}
    assert {"py.typed", "reports/page/page.html", "reports/page/page.css"} <= package
    assert {path.partition(".")[2] for path in package} == {"py", "typed", "html", "css", "js"}


# ---- making a release -----------------------------------------------------------------------------

FILES = ["README.md", "tests/test_a.py", "src/stratavit/__init__.py", "src/stratavit/reports/page/page.html"]
PACKAGE = ["stratavit/__init__.py", "stratavit/reports/page/page.html"]


@pytest.mark.parametrize(
    ("source", "package", "fault"),
    [
        (FILES, PACKAGE, None),
        (FILES[1:], PACKAGE, "stratavit-1.0.tar.gz lacks README.md"),
        ([*FILES, "notes.txt"], PACKAGE, "stratavit-1.0.tar.gz holds by mistake notes.txt"),
        (FILES, PACKAGE[:1], "stratavit-1.0-py3-none-any.whl lacks stratavit/reports/page/page.html"),
        (FILES, [*PACKAGE, "tests/test_a.py"], "stratavit-1.0-py3-none-any.whl holds by mistake tests/test_a.py"),
    ],
)
def test_a_file_too_many_or_too_few_ends_a_release(tmp_path, source, package, fault):
    sdist, wheel = tmp_path / "stratavit-1.0.tar.gz", tmp_path / "stratavit-1.0-py3-none-any.whl"
    with tarfile.open(sdist, "w:gz") as archive:
        for name in [*source, "PKG-INFO"]:
            archive.addfile(tarfile.TarInfo(f"stratavit-1.0/{name}"), io.BytesIO())
    with zipfile.ZipFile(wheel, "w") as archive:
        for name in [*package, *(f"stratavit-1.0.dist-info/{name}" for name in make.DIST_INFO)]:
            archive.writestr(name, "")
    with pytest.raises(make.ReleaseError, match=re.escape(fault)) if fault else contextlib.nullcontext():
        make.check_contents(sdist, wheel, set(FILES))


def vulnerable(*fixes):
    return {"name": "torch", "version": "1", "vulns": [{"id": "V-1", "fix_versions": list(fixes)}]}


def audited(monkeypatch, code, out, error=""):
    monkeypatch.setattr(make.subprocess, "run", lambda *_, **__: subprocess.CompletedProcess([], code, out, error))
    return make.audit(ROOT)


SOUND = {"name": "timm", "version": "1", "vulns": []}
SKIPPED = [{"name": name, "skip_reason": "not found"} for name in ("rich", "stratavit")]


@pytest.mark.parametrize(
    ("packages", "found"),
    [
        (None, "not checked, the service did not answer"),
        (SKIPPED, "not checked, the service knows none of 1 packages"),
        ([SOUND], "none known in 1 packages"),
        ([SOUND, *SKIPPED], "none known in 1 packages; not checked: rich"),
        ([vulnerable(), SOUND], "known, not mended yet: torch V-1"),
    ],
)
def test_only_packages_that_the_service_knows_count_as_checked(monkeypatch, packages, found):
    text = "no connection" if packages is None else json.dumps({"dependencies": packages})
    assert audited(monkeypatch, 1, text) == found


def test_a_vulnerability_that_a_newer_release_fixes_or_an_audit_that_fails_ends_a_release(monkeypatch):
    with pytest.raises(make.ReleaseError, match="torch V-1"):
        audited(monkeypatch, 1, json.dumps({"dependencies": [SOUND, vulnerable("2")]}))
    with pytest.raises(make.ReleaseError, match="no such option"):
        audited(monkeypatch, 2, "", "Traceback: no such option")


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    """A repository of one commit, with an earlier release in dist/."""
    monkeypatch.setattr(make, "ROOT", tmp_path)
    (tmp_path / ".gitignore").write_text("dist/\ndist-*/\n")
    (tmp_path / "dist").mkdir()
    (tmp_path / "dist" / "earlier").write_text("release")
    who = ["-c", "user.name=t", "-c", "user.email=t@example.org"]
    for arguments in (["init", "-q"], ["add", "-A"], [*who, "commit", "-qm", "one"]):
        subprocess.run(["git", *arguments], cwd=tmp_path, check=True)
    return tmp_path


def content(checkout):
    return {path.name for path in checkout.iterdir()} - {".git", ".gitignore"}, os.listdir(checkout / "dist")


def test_files_that_are_not_committed_are_named_and_dist_stays(checkout, capsys):
    (checkout / "forgotten.py").write_text("")
    assert make.main() == 1
    assert "forgotten.py" in capsys.readouterr().err
    assert content(checkout) == ({"dist", "forgotten.py"}, ["earlier"])


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        (None, None),
        (make.ReleaseError("a check"), "a check"),
        (OSError(28, "No space left on device"), "No space"),
        (KeyboardInterrupt(), "interrupted"),
    ],
)
def test_a_release_takes_the_place_of_the_last_one_or_leaves_dist_and_nothing_else(
    checkout, monkeypatch, capsys, fault, said
):
    def release(work, dist):
        dist.mkdir()
        (dist / "new.whl").write_text("")
        if fault is not None:
            raise fault

    monkeypatch.setattr(make, "release", release)
    assert make.main() == (fault is not None)
    line = capsys.readouterr().err
    assert fault is None or re.fullmatch(f".*{said}.*dist/ is as it was\n", line)
    assert content(checkout) == ({"dist"}, ["new.whl" if fault is None else "earlier"])


@pytest.mark.parametrize("number", [1, 2])
def test_a_release_that_is_interrupted_while_it_is_moved(tmp_path, monkeypatch, number):
    for name in ("new", "dist"):
        (tmp_path / name).mkdir()
        (tmp_path / name / name).touch()
    stopped_after_rename(monkeypatch, number, SystemExit)
    with pytest.raises(SystemExit):
        make.put(tmp_path / "new", tmp_path / "dist", tmp_path / "old")
    assert [path.name for path in (tmp_path / "dist").iterdir()] == [["dist", "new"][number - 1]]
