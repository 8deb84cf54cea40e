"""What the suite says under several versions of Python, torch and the rest; `make test-matrix` runs it, by noxfile.py.

    python benchmarks/version_matrix.py record NAME JUNIT.xml...  # in the environment of that run; JSON beside it
    python benchmarks/version_matrix.py table FOLDER              # the records of a folder as a dated table

Of a test that several reports have, the last one counts. Ends with 1 where a test failed.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import xml.etree.ElementTree as ElementTree
from collections import Counter
from collections.abc import Sequence
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


def counted(reports: Sequence[Path], stopped: bool = False) -> dict[str, Any]:
    """Tests by outcome, reasons of skips and names of failures, of JUnit files; later ones replace what they repeat."""
    cases: dict[str, tuple[str, str]] = {}
    seconds = 0.0
    mended: list[str] = []
    for report in reports:
        root = ElementTree.parse(report)
        found = {f"{case.get('classname')}::{case.get('name')}": _outcome(case) for case in root.iter("testcase")}
        last = _file(list(found)[-1])
        mended += [name for name in found if cases.get(name, ("", ""))[0] == "failed" and found[name][0] == "passed"]
        cases |= {name: outcome for name, outcome in found.items() if not (stopped and _file(name) == last)}
        seconds += sum(float(suite.get("time", 0)) for suite in root.iter("testsuite"))
    outcomes = Counter(outcome for outcome, _ in cases.values())
    return {
        "counts": {outcome: outcomes[outcome] for outcome in ("passed", "failed", "skipped")},
        "seconds": round(seconds),
        "files": sorted({_file(name) for name in cases}),
        "reasons": Counter(reason for outcome, reason in cases.values() if outcome == "skipped"),
        "mended": mended,
        "failures": [name for name, (outcome, _) in cases.items() if outcome == "failed"],
    }


def record(name: str, reports: Sequence[Path], stopped: bool = False) -> int:
    """Notes what a run found, with the versions of this environment."""
    found = {"name": name, "python": platform.python_version(), "packages": {p: _version(p) for p in PACKAGES}}
    found |= counted(reports, stopped)
    reports[0].with_suffix(".json").write_text(json.dumps(found, indent=1), encoding="utf-8")
    print(name, found["counts"], *found["failures"], sep="\n  ")
    return int(found["counts"]["failed"] > 0)


def table(folder: Path) -> int:
    """Writes the table of all records, oldest torch first."""
    from common import write_results

    found = [json.loads(path.read_text(encoding="utf-8")) for path in folder.glob("*.json")]
    found.sort(key=lambda entry: [int(part) for part in entry["packages"]["torch"].split("+")[0].split(".")])
    facts = {entry["name"]: {"Python": entry["python"]} | entry["packages"] | entry["counts"] for entry in found}
    for entry in found:
        facts[entry["name"]] |= {"files of tests": len(entry["files"]), "seconds": entry["seconds"]}
    rows = [{"": what} | {name: facts[name][what] for name in facts} for what in next(iter(facts.values()))]
    lines = ["Skipped, with the reason that the test gives:", ""]
    lines += [f"- {e['name']}: {count} x {why}" for e in found for why, count in e["reasons"].items()] or ["- none"]
    lines += ["", "Failed:", ""]
    lines += [f"- {entry['name']}: {name}" for entry in found for name in entry["failures"]] or ["- none"]
    lines += ["", "Failed, and passed when run again:", ""]
    lines += [f"- {entry['name']}: {name}" for entry in found for name in entry["mended"]] or ["- none"]
    every = {path.stem for path in (Path(__file__).parents[1] / "tests").glob("test_*.py")}
    for entry in found:
        if left := sorted(every - set(entry["files"])):
            lines += ["", f"{entry['name']} did not run {', '.join(left)}."]
    write_results("test-matrix", rows, "\n".join(lines))
    return int(any(entry["counts"]["failed"] for entry in found))


def _file(name: str) -> str:
    return name.partition("::")[0].split(".")[1]


def _outcome(case: ElementTree.Element) -> tuple[str, str]:
    if case.find("failure") is not None or case.find("error") is not None:
        return "failed", ""
    skip = case.find("skipped")
    return ("passed", "") if skip is None else ("skipped", skip.get("message", ""))


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
    one.add_argument("reports", type=Path, nargs="+")
    one.add_argument("--stopped", action="store_true", help="runs were cut short: leave out the files they were in")
    commands.add_parser("table").add_argument("folder", type=Path)
    arguments = parser.parse_args()
    if arguments.command == "table":
        return table(arguments.folder)
    return record(arguments.name, arguments.reports, arguments.stopped)


if __name__ == "__main__":
    sys.exit(main())
