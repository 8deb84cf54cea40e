"""The order of packages: this list is the picture of the architecture. A package imports from those before it only."""

import ast
import inspect
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
from conftest import FAST

import stratavit

SOURCE = Path(__file__).parents[1] / "src" / "stratavit"
ORDER = (
    # ground
    *("version", "errors", "choices", "spec", "utils", "files", "data"),
    # networks
    *("elastic", "models", "interop"),
    # method
    *("calibration", "dropout_list", "evaluation", "budgets"),
    # object
    *("artifacts", "supernet", "hosts"),
    # use
    *("training", "reports", "tasks", "cli"),
)
OUTSIDE = ("plain", "__init__", "__main__")  # names for pickles, users and ``python -m``


def modules():
    """Dotted name -> file, of every module."""
    found = {}
    for path in SOURCE.rglob("*.py"):
        parts = path.relative_to(SOURCE).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts)] = path
    return found


def imports(path, lazy):
    """Dotted names of ours that a file imports; with `lazy` also inside functions and for type checkers."""
    known, found = modules(), set()
    tree = ast.parse(path.read_text(encoding="utf-8"))
    nodes = ast.walk(tree) if lazy else tree.body
    for node in nodes:
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "stratavit":
            place = node.module.removeprefix("stratavit").lstrip(".")
            for alias in node.names:
                name = f"{place}.{alias.name}".lstrip(".")
                found.add(name if name in known else place or "__init__")
        elif isinstance(node, ast.Import):
            found |= {alias.name.removeprefix("stratavit.") for alias in node.names if "stratavit" in alias.name}
    return found


def package(name):
    return name.split(".")[0]


def test_a_package_imports_from_those_below_it_only():
    for name in set(modules()) - set(OUTSIDE):
        for other in imports(modules()[name], lazy=True):
            assert ORDER.index(package(other)) <= ORDER.index(package(name)), f"{name} imports {other}"


def test_every_package_has_its_place():
    assert {package(name) for name in modules()} == {*ORDER, *OUTSIDE}


def test_tests_mirror_the_packages():
    folders = {path.parent.name for path in Path(__file__).parent.rglob("test_*.py")} - {Path(__file__).parent.name}
    assert folders <= {*ORDER, "devices"}  # what all packages do on another device than the CPU


def test_the_fast_lane_names_tests_that_exist():
    """Entries of `FAST`: a file of tests, or the beginning of a test's name in one."""
    for entry in FAST:
        file, _, name = entry.partition("::")
        assert f"\ndef {name}" in (Path(__file__).parent / file).read_text(encoding="utf-8"), entry


def graph(lazy):
    return {name: imports(path, lazy) - {name} for name, path in modules().items()}


def test_there_is_no_circle():
    links, done, path = graph(lazy=True), set(), []

    def visit(name):
        assert name not in path, " -> ".join([*path[path.index(name) :], name])
        if name not in done:
            path.append(name)
            for other in links[name]:
                visit(other)
            done.add(path.pop())

    for name in list(links):
        visit(name)


def test_the_longest_chain_of_imports():
    """From a module down to one that imports nothing of ours, as ``python -X importtime`` nests them."""
    links = graph(lazy=False)

    @cache
    def length(name):
        return 1 + max((length(other) for other in links[name]), default=0)

    longest = max((name for name in links if name not in OUTSIDE), key=length)
    chain = [longest]
    while links[chain[-1]]:
        chain.append(max(links[chain[-1]], key=length))
    assert len(chain) <= 13, " -> ".join(chain)


def test_importing_the_package_imports_nothing_heavy():
    heavy = ("torch", "timm", "torchvision", "matplotlib", "huggingface_hub", "transformers")
    code = f"import sys, stratavit; print([name for name in {heavy} if name in sys.modules])"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "[]"


def test_every_public_name_is_there():
    assert {name: getattr(stratavit, name) for name in stratavit.__all__}
    assert set(stratavit.__all__) <= set(dir(stratavit))
    assert set(stratavit._HOMES) == set(stratavit.__all__)
    with pytest.raises(AttributeError):
        stratavit.nothing  # noqa: B018


def public_functions():
    for name in stratavit.__all__:
        found = getattr(stratavit, name)
        if inspect.isfunction(found):
            yield name, found
    for name, method in vars(stratavit.SuperNet).items():
        function = inspect.unwrap(getattr(method, "__func__", method))
        if inspect.isfunction(function) and not name.startswith("_"):
            yield f"SuperNet.{name}", function


@pytest.mark.parametrize(("name", "function"), list(public_functions()))
def test_a_public_function_says_what_it_takes_gives_and_raises(name, function):
    text, signature = inspect.getdoc(function) or "", inspect.signature(function)
    taken = {key: one for key, one in signature.parameters.items() if key not in ("self", "cls")}
    assert [key for key, one in taken.items() if one.annotation is one.empty] == []
    assert [key for key in taken if key not in text] == []
    assert "Args:" in text or not taken
    if signature.return_annotation not in ("None", inspect.Signature.empty):
        assert "Returns:" in text or "Yields:" in text
    if "raise " in inspect.getsource(function):
        assert "Raises:" in text
