"""Makes a release of the last commit: sdist, wheel, bill of materials and checksums in dist/.

`make release` runs it with the tools of requirements.txt. Everything is made and checked in temporary folders (the
environment with torch takes up to 6 GB); dist/ is replaced at the very end, so a failure leaves it as it was.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = "src/stratavit/"
ELSEWHERE = {"TZ": "Pacific/Auckland", "LC_ALL": "C", "PYTHONHASHSEED": "1"}  # of the second build
DIST_INFO = {"METADATA", "RECORD", "WHEEL", "entry_points.txt", "licenses/LICENSE"}


class ReleaseError(Exception):
    """A check of the release does not hold; the message says which."""


def call(what: str, *command: str | Path, cwd: Path | None = None, changes: dict[str, str] | None = None) -> bytes:
    """What a command prints, run without this shell's Python settings."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")} | (changes or {})
    done = subprocess.run([*map(str, command)], cwd=cwd or ROOT, env=environment, capture_output=True)
    if done.returncode:
        print((done.stdout + done.stderr).decode(errors="replace"), file=sys.stderr)
        raise ReleaseError(f"{what} failed (exit code {done.returncode}, output above)")
    return done.stdout


def committed(folder: Path) -> tuple[set[str], str]:
    """Unpacks the last commit; its files, and its date in seconds."""
    if changed := call("git status", "git", "status", "--porcelain").decode().splitlines():
        raise ReleaseError(
            f"{len(changed)} files are not committed, the first is {changed[0][3:]}: commit or remove them"
        )
    with tarfile.open(fileobj=io.BytesIO(call("git archive", "git", "archive", "HEAD"))) as archive:
        archive.extractall(folder, filter="data")
        names = {member.name for member in archive if not member.isdir()}
    return names, call("git log", "git", "log", "-1", "--format=%ct").decode().strip()


def build(first: Path, second: Path, dist: Path, epoch: str) -> tuple[Path, Path]:
    """The sdist, and the wheel made from it.

    A second build in another folder, time zone and locale, its wheel straight from the tree, must have the same bytes.
    """
    again = second.parent / "again"
    run = (sys.executable, "-m", "build", "--outdir")
    date = {"SOURCE_DATE_EPOCH": epoch}
    call("building", *run, dist, first, changes=date)
    call("building again", *run, again, "--sdist", "--wheel", second, changes=date | ELSEWHERE)
    made = sorted(dist.iterdir())
    if [path.suffix for path in made] != [".whl", ".gz"]:
        raise ReleaseError(f"expected one wheel and one sdist, got {[path.name for path in made]}")
    for path in made:
        if path.read_bytes() != (again / path.name).read_bytes():
            raise ReleaseError(f"two builds of {path.name} differ")
    return made[1], made[0]


def check_contents(sdist: Path, wheel: Path, files: set[str]) -> None:
    """The sdist holds what is committed, the wheel the package."""
    with tarfile.open(sdist) as archive:
        packed = {member.name.partition("/")[2] for member in archive if not member.isdir()}
    compare(sdist.name, packed, files | {"PKG-INFO"})
    info = "-".join(wheel.name.split("-")[:2]) + ".dist-info/"
    package = {name.removeprefix("src/") for name in files if name.startswith(PACKAGE)}
    with zipfile.ZipFile(wheel) as archive_:
        compare(wheel.name, set(archive_.namelist()), package | {info + name for name in DIST_INFO})


def compare(what: str, found: set[str], expected: set[str]) -> None:
    """One sentence with the names that are too many or too few."""
    for names, verb in ((expected - found, "lacks"), (found - expected, "holds by mistake")):
        if names:
            raise ReleaseError(f"{what} {verb} {', '.join(sorted(names)[:5])} ({len(names)} files)")


def bill(python: Path, work: Path, target: Path, version: str, epoch: str) -> dict[str, str]:
    """Writes the CycloneDX bill of materials of an environment; its components and their versions."""
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    described = work / "pyproject.toml"  # the tool reads a version from there only
    described.write_text(text.replace('dynamic = ["version"]', f'version = "{version}"'), encoding="utf-8")
    command = [sys.executable, "-m", "cyclonedx_py", "environment", "--output-reproducible", "--mc-type", "library"]
    command += ["--pyproject", str(described), "--of", "JSON", "-o", str(target), str(python)]
    call("the bill of materials", *command, changes={"SOURCE_DATE_EPOCH": epoch})
    listed = json.loads(target.read_text(encoding="utf-8"))
    if listed["metadata"]["component"].get("version") != version or "file:" in json.dumps(listed):
        raise ReleaseError("the bill of materials lacks the version, or names a file of this machine")
    return {item["name"]: item["version"] for item in listed["components"]}


def audit(site: Path) -> str:
    """What is known about vulnerabilities of the packages in a folder; packages that nobody answered for do not count.

    Raises:
        ReleaseError: A package has a known vulnerability that a newer release mends.
    """
    command = [sys.executable, "-m", "pip_audit", "--path", str(site), "--format", "json", "--progress-spinner", "off"]
    answer = subprocess.run(command, capture_output=True, text=True)
    if answer.returncode not in (0, 1):  # 1: there are findings
        raise ReleaseError(f"pip-audit failed: {answer.stderr.strip()[-500:]}")
    try:
        found: list[dict[str, Any]] = json.loads(answer.stdout)["dependencies"]
    except ValueError:  # no JSON
        return "not checked, the service did not answer"
    known = {item["name"]: item["vulns"] for item in found if "vulns" in item}
    unknown = sorted(item["name"] for item in found if "vulns" not in item and item["name"] != "stratavit")
    if not known:
        return f"not checked, the service knows none of {len(unknown)} packages"
    bad = [f"{name} {vulnerability['id']}" for name, all_ in known.items() for vulnerability in all_]
    if any(vulnerability["fix_versions"] for all_ in known.values() for vulnerability in all_):
        raise ReleaseError(f"known vulnerabilities, of which newer releases mend some: {', '.join(bad)}")
    told = f"none known in {len(known)} packages" if not bad else f"known, not mended yet: {', '.join(bad)}"
    return told + (f"; not checked: {', '.join(unknown)}" if unknown else "")


def release(work: Path, dist: Path) -> None:
    """Makes and checks everything; `dist` is complete when it returns."""
    files, epoch = committed(work / "first")
    committed(work / "another place")
    sdist, wheel = build(work / "first", work / "another place", dist, epoch)
    print(f"built        {sdist.name} and, from it, {wheel.name}; a second build has the same bytes")
    call("twine check", sys.executable, "-m", "twine", "check", "--strict", sdist, wheel)
    check_contents(sdist, wheel, files)
    print(
        f"contents     sdist: the {len(files)} files of the commit; wheel: the package and its licence; metadata sound"
    )
    call("making an environment", sys.executable, "-m", "venv", "--without-pip", work / "env")
    python = work / "env/bin/python"
    pip = (sys.executable, "-m", "pip", "--python", python)
    call("installing the wheel", *pip, "install", wheel)
    call("pip check", *pip, "check")
    (work / "smoke").mkdir()
    shutil.copy(work / "first/release/smoke.py", work / "smoke")
    said = call("the smoke test", python, "-I", "smoke.py", cwd=work / "smoke").decode().splitlines()
    print("smoke test  ", "\n             ".join(said))
    version = wheel.name.split("-")[1]
    components = bill(python, work, dist / f"stratavit-{version}.cdx.json", version, epoch)
    print(f"bill         {len(components)} components")
    print(f"audit        {audit(next((work / 'env').glob('lib/python*/site-packages')))}")
    sums = [f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {path.name}\n" for path in sorted(dist.iterdir())]
    (dist / "SHA256SUMS").write_text("".join(sums), encoding="utf-8")


def put(ready: Path, target: Path, aside: Path) -> None:
    """Lets a folder take the place of another, which comes back if that does not succeed."""
    try:
        if target.exists():
            target.rename(aside)
        ready.rename(target)
    except BaseException:
        if aside.exists() and not target.exists():
            aside.rename(target)
        raise


def main() -> int:
    """0, or 1 after one sentence that says what does not hold."""
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    target = ROOT / "dist"
    aside = tempfile.TemporaryDirectory(dir=ROOT, prefix="dist-")  # on the same disk: what is done is renamed
    try:
        with aside as beside, tempfile.TemporaryDirectory(prefix="release-") as work:
            ready = Path(beside) / "new"
            release(Path(work), ready)
            put(ready, target, Path(beside) / "old")
    except (ReleaseError, OSError, KeyboardInterrupt) as error:
        print(f"release: {str(error) or 'interrupted'}; dist/ is as it was", file=sys.stderr)
        return 1
    for path in sorted(target.iterdir()):
        print(f"dist/        {path.name}, {path.stat().st_size:,} bytes")
    return 0


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("release: stopped; dist/ is as it was"))
    sys.exit(main())
