"""What the suite says under several versions of Python, torch and the rest; `make test-matrix` runs it, by noxfile.py.

    python benchmarks/version_matrix.py record NAME JUNIT.xml  # in the environment of that run; JSON beside it
    python benchmarks/version_matrix.py table FOLDER           # the records of a folder as a dated table

Ends with 1 where a test failed.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import xml.etree.ElementTree as ElementTree
from collections import Counter
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

PACKAGES = [
    "torch",
    "torchvision",
    "timm",
    "numpy",
    "safetensors",
    "huggingface_hub",
    "transformers",
    "accelerate",
    "tensorboard",
    "onnx",
    "onnxscript",
    "onnxruntime",
    "scikit-learn",
    "pillow",
    "matplotlib",
    "rich",
]


def counted(report: Path) -> dict[str, Any]:
    """Tests by outcome, reasons of skips and names of failures, of a JUnit file."""
    cases = list(ElementTree.parse(report).iter("testcase"))
    outcomes: Counter[str] = Counter()
    reasons: Counter[str] = Counter()
    failures: list[str] = []
    for case in cases:
        bad = case.find("failure") is not None or case.find("error") is not None
        skip = case.find("skipped")
        outcomes["failed" if bad else "passed" if skip is None else "skipped"] += 1
        if bad:
            failures.append(f"{case.get('classname')}::{case.get('name')}")
        elif skip is not None:
            reasons[skip.get("message", "")] += 1
    seconds = sum(float(suite.get("time", 0)) for suite in ElementTree.parse(report).iter("testsuite"))
    counts = {name: outcomes[name] for name in ("passed", "failed", "skipped")}
    return {"counts": counts, "seconds": round(seconds), "reasons": reasons, "failures": failures}


def record(name: str, report: Path) -> int:
    """Notes what a run found, with the versions of this environment."""
    found = {"name": name, "python": platform.python_version(), "packages": {p: _version(p) for p in PACKAGES}}
    found |= counted(report)
    report.with_suffix(".json").write_text(json.dumps(found, indent=1), encoding="utf-8")
    print(name, found["counts"], *found["failures"], sep="\n  ")
    return int(found["counts"]["failed"] > 0)


def table(folder: Path) -> int:
    """Writes the table of all records, oldest torch first."""
    from common import write_results

    found = [json.loads(path.read_text(encoding="utf-8")) for path in folder.glob("*.json")]
    found.sort(key=lambda entry: [int(part) for part in entry["packages"]["torch"].split("+")[0].split(".")])
    facts = {entry["name"]: {"Python": entry["python"]} | entry["packages"] | entry["counts"] for entry in found}
    for entry in found:
        facts[entry["name"]]["seconds"] = entry["seconds"]
    rows = [{"": what} | {name: facts[name][what] for name in facts} for what in next(iter(facts.values()))]
    lines = ["Skipped, with the reason that the test gives:", ""]
    lines += [f"- {e['name']}: {count} x {why}" for e in found for why, count in e["reasons"].items()] or ["- none"]
    lines += ["", "Failed:", ""]
    lines += [f"- {entry['name']}: {name}" for entry in found for name in entry["failures"]] or ["- none"]
    write_results("test-matrix", rows, "\n".join(lines))
    return int(any(entry["counts"]["failed"] for entry in found))


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "-"


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    one = commands.add_parser("record")
    one.add_argument("name")
    one.add_argument("report", type=Path)
    commands.add_parser("table").add_argument("folder", type=Path)
    arguments = parser.parse_args()
    return table(arguments.folder) if arguments.command == "table" else record(arguments.name, arguments.report)


if __name__ == "__main__":
    sys.exit(main())
