"""Every command and code block in README and docs is true today."""

import os
import re
import runpy
import shlex
import subprocess
import sys
from pathlib import Path

import architectures
import pytest
import torch
from helpers import make_images, make_net
from test_architecture import ORDER

import stratavit
from stratavit.cli.parser import parsers
from stratavit.models.architecture import describe
from stratavit.training.recipe import Recipe
from stratavit.training.values import read_toml

ROOT = Path(__file__).parents[1]
IMAGES = make_images(2, seed=9)
MIXED = {"blocks.0.attn": 4, "blocks.0.mlp": 0, "blocks.1.attn": 0, "blocks.1.mlp": 33}
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
STRATAVIT = re.compile(r"(accelerate launch|torchrun) [^\n]*?-m stratavit ")
BLOCK = re.compile(
    r"(?P<stage><!-- runs in tests with a small model and images -->\n)?```(?P<language>\w+)\n(?P<code>.*?)```",
    re.DOTALL,
)
BLOCKS = [(page, match) for page in PAGES for match in BLOCK.finditer(page.read_text(encoding="utf-8"))]


def named(language):
    found = [(page, match) for page, match in BLOCKS if match["language"] == language]
    return [pytest.param(match, id=f"{page.name}-{i}") for i, (page, match) in enumerate(found)]


@pytest.mark.parametrize("match", named("python"))
def test_python_blocks(match, tmp_path, monkeypatch):
    """As they stand; those that need files of a reader's run in `test_docs_commands`."""
    code = compile(match["code"], "block", "exec")
    if match["stage"] is None:
        monkeypatch.chdir(tmp_path)
        exec(code, {"__name__": "__main__"})


@pytest.mark.parametrize("match", named("console"))
def test_command_lines(match):
    for line in match["code"].splitlines():
        command, *arguments = shlex.split(STRATAVIT.sub("stratavit ", line))
        if command == "stratavit":
            assert parsers()[0].parse_args(arguments).command
        elif command == "pip":
            assert re.fullmatch(r"install \.(\[[a-z,]+\])?", " ".join(arguments))
            for extra in re.findall(r"[a-z]+(?=[,\]])", arguments[1]):
                assert f"\n{extra} = [" in (ROOT / "pyproject.toml").read_text()
        else:
            assert command == "make"
            assert f"\n{arguments[0]}:" in (ROOT / "Makefile").read_text()


@pytest.mark.parametrize("match", named("toml"))
def test_recipes(match, tmp_path):
    (tmp_path / "recipe.toml").write_text(match["code"], encoding="utf-8")
    keys = read_toml(tmp_path / "recipe.toml")
    assert keys
    assert Recipe.from_dict(keys).to_dict().items() >= keys.items()


def test_the_loader_without_this_library(tmp_path):
    """The documented loader, in a process that cannot import stratavit, has the same outputs, bit for bit."""
    page = next(match for page, match in BLOCKS if page.name == "files.md" and "def load_small" in match["code"])
    small = {method: make_net("plain", method).extract(spec=MIXED) for method in ("default", "paper")}
    for number, name in enumerate(architectures.ALL):
        net = stratavit.SuperNet(architectures.make(name)).contract([IMAGES])
        sites = net.sites
        spec = {site.name: max(1, site.width // (2 + i % 3)) for i, site in enumerate(sites)} | {sites[1].name: 0}
        spec |= {place.name: place.width // 2 for place in net.cost.places[:1]}
        small[str(number)] = stratavit.as_timm(net.extract(spec=spec))
    assert any("tokens" in describe(model) for model in small.values())
    for folder, model in small.items():
        stratavit.save(model, tmp_path / folder)
    torch.save(IMAGES, tmp_path / "images.pt")
    for name in ("plain.py", "merging.py"):
        (tmp_path / name).write_bytes((ROOT / "src/stratavit/elastic" / name).read_bytes())
    code = (
        "import sys; sys.modules['stratavit'] = None\n" + page["code"] + "\nimages = torch.load('images.pt')\n"
        f"torch.set_num_threads({torch.get_num_threads()})\n"
        f"with torch.no_grad(): outputs = {{name: load_small(name)(images) for name in {list(small)}}}\n"
        "torch.save(outputs, 'outputs.pt')\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=tmp_path)
    outputs = torch.load(tmp_path / "outputs.pt")
    with torch.no_grad():
        for name, model in small.items():
            assert torch.equal(outputs[name], model(IMAGES)), name


def test_every_block_is_checked():
    """No block escapes the tests above by its language or by a reason that they cannot read."""
    assert {match["language"] for _, match in BLOCKS} == {"python", "console", "toml"}
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        staged = [match for found, match in BLOCKS if found == page and match["stage"]]
        assert len(re.findall(r"<!--\s*(?:not run|runs)", text)) == len(staged), page.name
        assert len(re.findall(r"^```\w", text, re.MULTILINE)) == sum(found == page for found, _ in BLOCKS), page.name


def test_links_lead_somewhere():
    for page in PAGES:
        for target in re.findall(r"\]\((?!http)([^)#]+)\)", page.read_text(encoding="utf-8")):
            assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_commands_of_benchmarks_exist():
    """Every `python PATH` that a page names is a script of the repository."""
    named_scripts = {name for page in PAGES for name in re.findall(r"`python ([\w/]+\.py)", page.read_text("utf-8"))}
    assert len(named_scripts) > 10
    assert not [name for name in named_scripts if not (ROOT / name).exists()]


def test_every_public_name_is_in_the_reference():
    assert sorted(reference()) == sorted(f"stratavit.{name}" for name in stratavit.__all__)


def reference():
    return re.findall(r"^::: ([\w.]+)$", (ROOT / "docs/api.md").read_text(encoding="utf-8"), re.MULTILINE)


def test_the_command_line_reference_is_current():
    tool = runpy.run_path(str(ROOT / "docs/tools/cli_page.py"))
    assert tool["PAGE"].read_text(encoding="utf-8") == tool["page"](), "run: python docs/tools/cli_page.py"


def test_the_picture_of_the_packages_is_current():
    tool = runpy.run_path(str(ROOT / "docs/tools/architecture.py"))
    assert tuple(name for floor in tool["FLOORS"].values() for name in floor) == ORDER
    assert tool["PICTURE"].read_text(encoding="utf-8") == tool["picture"](), "run: python docs/tools/architecture.py"


def test_the_site_builds(tmp_path):
    """With warnings as errors: links, anchors, navigation and the reference; and it needs no network to be read."""
    for package in ("mkdocs", "material", "mkdocstrings"):
        pytest.importorskip(package)
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "-d", str(tmp_path / "site")]
    quiet = {name: value for name, value in os.environ.items() if name != "PYTHONWARNINGS"}  # none of ours is imported
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=quiet)
    assert done.returncode == 0, done.stderr
    for page in (ROOT / "docs").rglob("*.md"):
        html = (tmp_path / "site" / page.relative_to(ROOT / "docs")).with_suffix(".html").read_text(encoding="utf-8")
        loaded = re.findall(r"<(?:script|img|iframe)[^>]* src=[\"']?([^\"' >]+)", html)
        loaded += re.findall(r"<link[^>]* rel=[\"']?(?:stylesheet|icon|preload)[^>]* href=[\"']?([^\"' >]+)", html)
        assert not [address for address in loaded if address.startswith(("http:", "https:", "//"))], page.name
    html = (tmp_path / "site/api.html").read_text(encoding="utf-8")
    assert all(f'id="{path}"' in html for path in reference())
