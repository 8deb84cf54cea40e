"""Writes docs/images/architecture.svg from the imports of the code.

    python docs/tools/architecture.py

The site's build runs it, and a test compares the committed picture with what it makes of the code.
"""

from __future__ import annotations

import ast
import textwrap
from html import escape
from pathlib import Path

ROOT = Path(__file__).parents[2]
SOURCE = ROOT / "src" / "stratavit"
PICTURE = ROOT / "docs" / "images" / "architecture.svg"
FLOORS = {  # from ground to use; tests/test_architecture.py holds every import to this order
    "ground": ("version", "errors", "choices", "spec", "utils", "files", "data"),
    "networks": ("elastic", "models", "interop"),
    "method": ("calibration", "dropout_list", "evaluation", "budgets"),
    "object": ("artifacts", "supernet", "hosts"),
    "use": ("training", "reports", "tasks", "cli"),
}
COLOURS = {"ground": "#eceff1", "networks": "#e3f2fd", "method": "#e8f5e9", "object": "#fff8e1", "use": "#fce4ec"}
WIDTH, LABEL, GAP, LINE, PAD = 1080, 86, 10, 15, 10
PIXELS_A_LETTER = 6.1  # of the text below the names, 11 px


def files_of(package: str) -> list[Path]:
    """All modules of a package; a module that stands alone is its own package."""
    folder = SOURCE / package
    return sorted(folder.rglob("*.py")) if folder.is_dir() else [folder.with_suffix(".py")]


def purpose_of(package: str) -> str:
    """First sentence of a package's docstring."""
    folder = SOURCE / package
    text = (folder / "__init__.py" if folder.is_dir() else files_of(package)[0]).read_text(encoding="utf-8")
    return " ".join((ast.get_docstring(ast.parse(text)) or "").split("\n\n")[0].split())


def imported_by(package: str) -> set[str]:
    """Other packages that a package imports, inside functions and for type checkers, too."""
    known, found = {name for floor in FLOORS.values() for name in floor}, set()
    for file in files_of(package):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom):
                names = [f"{node.module}.{alias.name}" for alias in node.names]
            elif isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            else:
                continue
            for parts in (name.split(".") for name in names):
                if parts[0] == "stratavit" and len(parts) > 1:
                    found.add(parts[1])
    return (found & known) - {package}


def imports_of(package: str) -> str:
    """What a package imports, in the order of the floors."""
    found = imported_by(package)
    names = [name for floor in FLOORS.values() for name in floor if name in found]
    return f"imports {', '.join(names)}" if names else "imports none of the others"


def picture() -> str:
    """The floors as SVG: ground below, use above; a box says what a package is for and what it imports."""
    parts, top = [], GAP
    for floor, packages in reversed(FLOORS.items()):
        width = (WIDTH - LABEL - GAP * (len(packages) + 1)) / len(packages)
        letters = int((width - 2 * PAD) / PIXELS_A_LETTER)
        texts = [
            (textwrap.wrap(purpose_of(package), letters), textwrap.wrap(imports_of(package), letters))
            for package in packages
        ]
        height = max(len(first) + len(second) for first, second in texts) * LINE + 2 * PAD + 32
        parts.append(
            f'<rect x="0" y="{top}" width="{WIDTH}" height="{height + 2 * GAP}" fill="{COLOURS[floor]}"/>\n'
            f'<text x="{PAD}" y="{top + GAP + 22}" class="floor">{floor}</text>'
        )
        for number, (package, (purpose, imports)) in enumerate(zip(packages, texts, strict=True)):
            left = LABEL + GAP + number * (width + GAP)
            parts.append(box(package, purpose, imports, left, top + GAP, width, height))
        top += height + 3 * GAP
    style = (
        "text{font-family:Helvetica,Arial,sans-serif;font-size:11px;fill:#263238}"
        ".floor{font-size:14px;font-style:italic}.name{font-size:14px;font-weight:bold}.imports{fill:#607d8b}"
    )
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{top}" viewBox="0 0 {WIDTH} {top}">\n'
        f"<title>Packages of StrataViT and what they import</title>\n<style>{style}</style>\n"
        f'<rect width="{WIDTH}" height="{top}" fill="#ffffff"/>\n' + "\n".join(parts) + "\n</svg>\n"
    )


def box(
    package: str, purpose: list[str], imports: list[str], left: float, top: float, width: float, height: float
) -> str:
    """One package."""
    name = f"{package}/" if (SOURCE / package).is_dir() else f"{package}.py"
    lines = [f'<text x="{left + PAD:.1f}" y="{top + 24:.1f}" class="name">{escape(name)}</text>']
    for number, line in enumerate([*purpose, *imports]):
        kind = ' class="imports"' if number >= len(purpose) else ""
        lines.append(f'<text x="{left + PAD:.1f}" y="{top + 46 + number * LINE:.1f}"{kind}>{escape(line)}</text>')
    frame = f'<rect x="{left:.1f}" y="{top:.1f}" width="{width:.1f}" height="{height:.1f}" rx="5"'
    return f'{frame} fill="#ffffff" stroke="#90a4ae"/>\n' + "\n".join(lines)


def write() -> None:
    """Writes the picture where it differs from the one that is there."""
    text = picture()
    if not PICTURE.exists() or PICTURE.read_text(encoding="utf-8") != text:
        PICTURE.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    write()
