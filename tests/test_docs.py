"""Every command and code block in README and docs is true today."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import architectures
import pytest
import torch
from helpers import make_images, make_net

import stratavit
from stratavit.cli import parser

ROOT = Path(__file__).parents[1]
IMAGES = make_images(2, seed=9)
MIXED = {"blocks.0.attn": 4, "blocks.0.mlp": 0, "blocks.1.attn": 0, "blocks.1.mlp": 33}
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"(?P<note><!-- not run: [^\n]+ -->\n)?```(?P<language>\w+)\n(?P<code>.*?)```", re.DOTALL)
BLOCKS = [(page, match) for page in PAGES for match in BLOCK.finditer(page.read_text(encoding="utf-8"))]


def named(language):
    found = [(page, match) for page, match in BLOCKS if match["language"] == language]
    return [pytest.param(match, id=f"{page.name}-{i}") for i, (page, match) in enumerate(found)]


@pytest.mark.parametrize("match", named("python"))
def test_python_blocks(match, tmp_path):
    compile(match["code"], "block", "exec")
    if match["note"] is None:
        subprocess.run([sys.executable, "-c", match["code"]], check=True, cwd=tmp_path)


@pytest.mark.parametrize("match", named("console"))
def test_command_lines(match):
    for line in match["code"].splitlines():
        command, *arguments = shlex.split(line)
        if command == "stratavit":
            assert parser().parse_args(arguments).run_command
        else:
            assert command == "make"
            assert f"\n{arguments[0]}:" in (ROOT / "Makefile").read_text()


def test_the_loader_without_this_library(tmp_path):
    """The documented loader, in a process that cannot import stratavit, gives the same answers, bit for bit."""
    page = next(match for page, match in BLOCKS if page.name == "files.md" and "def load_small" in match["code"])
    small = {method: make_net("plain", method).extract(spec=MIXED) for method in ("default", "paper")}
    for number, name in enumerate(architectures.ALL):
        net = stratavit.SuperNet(architectures.make(name)).contract([IMAGES])
        sites = net.sites
        spec = {site.name: max(1, site.width // (2 + i % 3)) for i, site in enumerate(sites)} | {sites[1].name: 0}
        small[str(number)] = stratavit.as_timm(net.extract(spec=spec))
    for folder, model in small.items():
        stratavit.save(model, tmp_path / folder)
    torch.save(IMAGES, tmp_path / "images.pt")
    (tmp_path / "plain.py").write_bytes((ROOT / "src/stratavit/plain.py").read_bytes())
    code = (
        "import sys; sys.modules['stratavit'] = None\n" + page["code"] + "\nimages = torch.load('images.pt')\n"
        f"torch.set_num_threads({torch.get_num_threads()})\n"
        f"with torch.no_grad(): answers = {{name: load_small(name)(images) for name in {list(small)}}}\n"
        "torch.save(answers, 'answers.pt')\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=tmp_path)
    answers = torch.load(tmp_path / "answers.pt")
    with torch.no_grad():
        for name, model in small.items():
            assert torch.equal(answers[name], model(IMAGES)), name


def test_every_block_is_checked():
    """No block escapes the tests above by its language or by a reason that they cannot read."""
    assert {match["language"] for _, match in BLOCKS} == {"python", "console"}
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        notes = [match for found, match in BLOCKS if found == page and match["note"]]
        assert len(re.findall(r"<!--\s*not run", text)) == len(notes), page.name
        assert len(re.findall(r"^```\w", text, re.MULTILINE)) == sum(found == page for found, _ in BLOCKS), page.name


def test_links_lead_somewhere():
    for page in PAGES:
        for target in re.findall(r"\]\((?!http)([^)#]+)\)", page.read_text(encoding="utf-8")):
            assert (page.parent / target).exists(), f"{page.name}: {target}"
