"""Brings into the site what its pages link to outside docs/: other pages, source files, folders of results.

Pages are read in the repository, too, so they link to `../src/stratavit/errors.py` as it lies there. At build time
every such target becomes a page `repository/PATH`, and the links are turned to it.
"""

from __future__ import annotations

import os
import posixpath
import re
import runpy
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[2]
PLACE = "repository"
ALWAYS = ("CHANGELOG.md", "CONTRIBUTING.md", "benchmarks/README.md", "benchmarks/results")  # in the navigation
LINK = re.compile(r"(\]\()([^)\s#:]+)((?:#[^)\s]*)?\))")
LAST = "---\nsearch:\n  boost: 0.1\n---\n\n"  # found after the pages of docs/
ELSEWHERE = "https://unpkg.com/iframe-worker/shim"
FENCE = re.compile(r"^```.*?^```$", re.DOTALL | re.MULTILINE)


def on_pre_build(**_: Any) -> None:
    """Draws the picture of the packages from the code as it is."""
    runpy.run_path(str(ROOT / "docs/tools/architecture.py"))["write"]()


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds a page for every target in the repository, and for what these link to in turn."""
    waiting = [path for path in ALWAYS if (ROOT / path).exists()]
    for file in files.documentation_pages():
        waiting += [target for _, target in outward(f"docs/{file.src_uri}", file.content_string)]
    known: set[str] = set()
    while waiting:
        path = waiting.pop()
        if path in known or path.startswith("docs/"):
            continue
        known.add(path)
        content = page_of(path)
        if isinstance(content, bytes):
            files.append(File.generated(config, f"{PLACE}/{path}", content=content))
            continue
        files.append(File.generated(config, address(path), content=content))
        if path.endswith(".md") or (ROOT / path).is_dir():
            waiting += [target for _, target in outward(origin(path), content)]
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Turns links that leave docs/ to the pages that stand for their targets."""
    here = page.file.src_uri
    source = repository_path(here)
    targets = dict(outward(source, markdown))

    def turned(match: re.Match[str]) -> str:
        path = targets.get(match[2])
        if path is None:
            return match[0]
        goal = path.removeprefix("docs/") if path.startswith("docs/") else address(path)
        return match[1] + posixpath.relpath(goal, posixpath.dirname(here) or ".") + match[3]

    return outside_fences(markdown, lambda text: LINK.sub(turned, text))


def on_post_page(output: str, page: Any, **_: Any) -> str:
    """Puts a file of ours in the place of one that the theme loads from elsewhere: search needs no network."""
    ours = posixpath.relpath("javascripts/worker.js", posixpath.dirname(page.file.dest_uri) or ".")
    return output.replace(ELSEWHERE, ours)


def outward(source: str, markdown: str) -> list[tuple[str, str]]:
    """Links of a page, as written and as a path in the repository, that need another address in the site."""
    found = []
    for match in LINK.finditer(FENCE.sub("", markdown)):
        path = posixpath.normpath(posixpath.join(posixpath.dirname(source), match[2]))
        inside = source.startswith("docs/") and path.startswith("docs/")
        if not inside and not path.startswith("..") and (ROOT / path).exists():
            found.append((match[2], path))
    return found


def outside_fences(markdown: str, change: Any) -> str:
    """The markdown, changed outside of its code blocks."""
    parts, last = [], 0
    for fence in FENCE.finditer(markdown):
        parts += [change(markdown[last : fence.start()]), fence[0]]
        last = fence.end()
    return "".join([*parts, change(markdown[last:])])


def address(path: str) -> str:
    """Page of a path in the repository."""
    if path.endswith(".md"):
        return f"{PLACE}/{path}"
    return f"{PLACE}/{path}/list.md" if (ROOT / path).is_dir() else f"{PLACE}/{path}.md"


def origin(path: str) -> str:
    """Where links on the page of a path start from."""
    return f"{path}/list.md" if (ROOT / path).is_dir() else path


def repository_path(src_uri: str) -> str:
    """Where links on a page of the site start from, as a path in the repository."""
    return src_uri.removeprefix(f"{PLACE}/") if src_uri.startswith(f"{PLACE}/") else f"docs/{src_uri}"


def page_of(path: str) -> str | bytes:
    """Markdown that shows a file or a folder of the repository."""
    target = ROOT / path
    if target.is_dir():
        names = sorted(os.listdir(target))
        rows = [f"- [{name}]({name})" for name in names if name.endswith(".md")]
        return f"{LAST}# {path}\n\nTables as the scripts wrote them; each has a CSV of the same name.\n\n" + "\n".join(
            rows
        )
    if target.suffix == ".md":
        return LAST + target.read_text(encoding="utf-8")
    try:
        text = target.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        return target.read_bytes()
    language = {".py": "python", ".toml": "toml", ".sh": "bash"}.get(target.suffix, "text")
    return f"{LAST}# {path}\n\n````{language}\n{text}\n````\n"
