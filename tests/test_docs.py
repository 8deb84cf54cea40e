"""Every command and code block in README and docs is true today."""

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

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
    """The documented loader, in a process that cannot import stratavit, gives the same logits, bit for bit."""
    page = next(match for page, match in BLOCKS if page.name == "files.md" and "def load_small" in match["code"])
    for method in ("default", "paper"):
        small = make_net("plain", method).extract(spec=MIXED)
        stratavit.save(small, tmp_path / method)
        torch.save(IMAGES, tmp_path / "images.pt")
        code = (
            "import sys; sys.modules['stratavit'] = None\n" + page["code"] + f"\nfolder = {str(tmp_path / method)!r}\n"
            f"images = torch.load({str(tmp_path / 'images.pt')!r})\n"
            f"torch.set_num_threads({torch.get_num_threads()})\n"
            "import json\nprint(json.dumps(load_small(folder)(images).tolist()))\n"
        )
        done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
        with torch.no_grad():
            assert torch.equal(torch.tensor(json.loads(done.stdout)), small(IMAGES))


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
