"""Disks that are full, read-only or of another clock: the older file stays, and one sentence says which disk it was."""

import os
import shutil
import sys
from contextlib import suppress
from functools import partial

import pytest
import torch
from children import child, content, done, fill, mounted
from helpers import make_model, make_net
from image_folders import write_images
from training_runs import TINY, assert_same, fresh, outcome, run

import stratavit
from stratavit import ArtifactError, StrataViTError, SuperNet
from stratavit.cli import measure
from stratavit.cli.parser import main
from stratavit.evaluation import curve_points
from stratavit.reports import hub, plots
from stratavit.training import run_files, trainer

FULL = "the disk is full (No space left on device)"


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """Images of seven classes, a small model, and a super-network."""
    folder = tmp_path_factory.mktemp("work")
    write_images(folder / "data")
    net = make_net("plain", stratified=True)
    net.save(folder / "run")
    stratavit.save(net.extract(macs=0.5, verbose=False), folder / "small")
    stratavit.save(make_model("plain"), folder / "dense")
    return folder


def argv(work, command):
    """The command line of a command, but for ``--out``."""
    data = ["--data", str(work / "data"), "--workers", "0"]
    return {
        "convert": ["convert", str(work / "dense"), *data],
        "extract": ["extract", str(work / "run"), "--macs", "50%"],
        "curve": ["curve", str(work / "run"), *data, "--shares", "1,0.5"],
        "report": ["report", str(work / "run")],
        "export": ["export", str(work / "small"), "--format", "torch"],
    }[command]


# ---- full -------------------------------------------------------------------------------------------------------


POINTS = [curve_points.Point(*share, 100, 100, 50.0, 60.0, 1.0, 7) for share in (("1", 1.0), ("6/12", 0.5))]


def small_model():
    return make_net("plain").extract(spec={"blocks.0.attn": 8, "blocks.1.mlp": 20}, verbose=False)


WRITERS = {
    "super-network": lambda out: fresh().save(out, overwrite=True),
    "small model": lambda out: stratavit.save(small_model(), out, overwrite=True),
    "torch.export": lambda out: stratavit.export(small_model(), out, "torch", overwrite=True),
    "onnx": lambda out: stratavit.export(small_model(), out, "onnx", overwrite=True),
    "curve": lambda out: measure.write_curve(POINTS, out, "title", True),
    "report": lambda out: stratavit.write_report(make_net("plain", stratified=True), out, overwrite=True),
    "what would be uploaded": lambda out: hub.write_upload(small_model(), out, "me/it", POINTS, overwrite=True),
}


def refused(write, *said):
    """What `write` says."""
    with pytest.raises(StrataViTError) as caught:
        write()
    text = str(caught.value)
    assert text.isprintable(), text
    assert all(words in text for words in said), text
    return text


def written_on_a_full_disk(place, what):
    """With no room at all, with half of it, and with too little by a page; a new name, and an older one."""
    disk, write = mounted(place, "8m"), WRITERS[what]

    def fails(left):
        before = content(disk)
        fill(disk, left)
        refused(partial(write, disk / "out"), f"cannot write {disk / 'out'}: {FULL}; nothing was changed there")
        assert content(disk) == before

    if what in ("torch.export", "onnx"):  # which take seconds
        (disk / "out").write_text("older")
        return fails(8192)
    write(disk / "out")
    need = sum(len(found or b"") for found in content(disk).values())
    for old in (True, False) if what in ("super-network", "report") else (True,):
        if not old:
            (disk / "out").rename(disk / "older")
        for left in (0, need // 2, need - 4096):
            fails(left)
    (disk / "ballast").unlink()
    write(disk / "out")
    assert (disk / "out").exists()


@pytest.mark.parametrize("what", WRITERS)
def test_what_is_written_on_a_full_disk(place, what):
    done(written_on_a_full_disk, place, what)


def commands_on_a_full_disk(place, work):
    disk = mounted(place, "2m")
    for command in ("convert", "extract", "curve", "report"):
        fill(disk)
        assert main([*argv(work, command), "--out", str(disk / "new" / "out")]) == 2, command
        assert content(disk) == {}


def test_commands_on_a_full_disk(place, work):
    ended = child(commands_on_a_full_disk, place, work)
    assert ended.code == 0, ended.said
    for command in ("convert", "extract", "curve", "report"):
        (line,) = (line for line in ended.lines if line.startswith(f"stratavit {command}:"))
        assert f"{place / 'new' / 'out'}: {FULL}" in line
    assert "Traceback" not in ended.said


def printed_on_a_full_disk(path):
    sys.stdout = open("/dev/full", "w")  # noqa: SIM115
    return main(["info", str(path), "--json"])


def test_an_answer_that_cannot_be_printed(work):
    ended = child(printed_on_a_full_disk, work / "small")
    assert ended.code == 2
    assert ended.lines == [f"stratavit info: done, but cannot print the result: {FULL}"]


# ---- full while training ----------------------------------------------------------------------------------------


def once(owner, name, happens, at=1):
    """Lets something happen before the nth call of a function."""
    function, calls = getattr(owner, name), []

    def called(*args, **kwargs):
        calls.append(name)
        if len(calls) == at:
            happens()
        return function(*args, **kwargs)

    setattr(owner, name, called)


LEFT = "the last state in {} is sound, resume it to go on"
MOMENTS = {
    "a state": (trainer, "write_state", 2, "state.pt"),
    "the log": (run_files.Journal, "append", 1, "log.jsonl"),
    "the result": (SuperNet, "save", 1, ""),
    "the pictures": (plots, "plot_history", 1, ""),
}


def trained_on_a_full_disk(place, whole, moment):
    disk = mounted(place, "8m")
    owner, name, at, file = MOMENTS[moment]
    kept = {}

    def happens():
        kept.update(state=(disk / "run" / "state.pt").read_bytes())
        fill(disk)

    once(owner, name, happens, at)
    said = refused(partial(run, disk / "run"), str(disk / "run" / file), FULL, LEFT.format(disk / "run"))
    assert "nothing was changed" not in said
    assert (disk / "run" / "state.pt").read_bytes() == kept["state"]
    names = {path.name for path in (disk / "run").iterdir()}
    assert names <= {"state.pt", "log.jsonl"}, names
    fill(disk)
    refused(partial(run, disk / "run", resume=True), f"cannot write {disk / 'run' / 'training.lock'}: {FULL}")
    assert {path.name for path in (disk / "run").iterdir()} == names
    (disk / "ballast").unlink()
    run(disk / "run", resume=True)
    assert_same(outcome(disk / "run"), outcome(whole))


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """An uninterrupted run."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    run(folder)
    return folder


@pytest.mark.parametrize("moment", MOMENTS)
def test_training_on_a_full_disk(place, whole, moment):
    done(trained_on_a_full_disk, place, whole, moment)


def states_on_a_full_disk(place):
    """Wherever the disk ends."""
    disk = mounted(place, "2m")
    state = {"weights": {str(number): torch.randn(300) for number in range(20)}}
    run_files.write_state(disk, {"step": 1, **state})
    kept = (disk / "state.pt").read_bytes()
    for left in range(0, len(kept), 4096):
        fill(disk, left)
        words = f"cannot write {disk / 'state.pt'}: {FULL}; {LEFT.format(disk)}"
        refused(lambda: run_files.write_state(disk, {"step": 2, **state}), words)
        assert content(disk) == {"state.pt": kept}
    fill(disk, len(kept) + 4096)
    run_files.write_state(disk, {"step": 2, **state})
    assert run_files.read_state(disk)["step"] == 2


def test_states_on_a_full_disk(place):
    done(states_on_a_full_disk, place)


def begun_on_a_full_disk(place):
    disk = mounted(place, "8m")
    fill(disk)
    refused(partial(run, disk / "run"), str(disk / "run"), FULL)
    assert content(disk) == {}
    (disk / "ballast").unlink()
    once(trainer, "write_state", partial(fill, disk))
    refused(partial(run, disk / "run"), str(disk / "run" / "state.pt"), FULL, "there is no state to resume yet")
    (disk / "ballast").unlink()
    run(disk / "run")


def test_training_that_begins_on_a_full_disk(place):
    done(begun_on_a_full_disk, place)


def tracked_on_a_full_disk(place):
    """The tracker writes in a thread of its own, now or later; the log may miss a row."""
    disk, append = mounted(place, "8m"), run_files.Journal.append

    def tolerant(journal, row):
        with suppress(ArtifactError):
            append(journal, row)

    run_files.Journal.append = tolerant
    once(run_files.Journal, "append", partial(fill, disk), at=2)
    recipe = stratavit.Recipe.from_dict({**TINY.to_dict(), "tracker": "tensorboard"})
    with suppress(ArtifactError):
        run(disk / "run", recipe=recipe)
    (disk / "ballast").unlink()
    run(disk / "run", recipe=recipe, resume=True)
    SuperNet.load(disk / "run")


def test_a_tracker_on_a_full_disk(place):
    ended = child(tracked_on_a_full_disk, place)
    assert ended.code == 0, ended.said
    assert "Traceback" not in ended.said, ended.said


# ---- read-only --------------------------------------------------------------------------------------------------


def commands_on_a_read_only_disk(place, work, whole):
    """Refused before any work is done; what is there can be read."""
    for name in ("run", "small", "dense"):
        shutil.copytree(work / name, place / name)
    shutil.copytree(whole, place / "begun")
    mounted(place, read_only=True)
    before = content(place)
    contract, SuperNet.contract = SuperNet.contract, None
    for command in ("convert", "extract", "curve", "report", "export"):
        for out in ("new", "new/below"):
            assert main([*argv(work, command), "--out", str(place / out)]) == 2
    SuperNet.contract = contract
    refused(partial(run, place / "trained"), f"cannot write {place / 'trained'}: Read-only file system")
    refused(partial(run, place / "begun", resume=True), f"cannot write {place / 'begun' / 'training.lock'}: Read-only")
    for path in (place / "run", place / "small"):
        assert main(["info", str(path)]) == 0
    assert main([*argv(place, "extract"), "--out", str(work / "elsewhere")]) == 0
    assert main(["evaluate", str(place / "small"), *argv(work, "curve")[2:6]]) == 0
    assert content(place) == before


def test_commands_on_a_read_only_disk(place, work, whole):
    ended = child(commands_on_a_read_only_disk, place, work, whole)
    assert ended.code == 0, ended.said
    lines = [line for line in ended.lines if line.startswith("stratavit ")]
    assert len(lines) == 10, ended.said
    assert all(line.endswith(f": {place} is read-only") for line in lines), ended.said
    assert "Traceback" not in ended.said


def written_without_permission(tmp_path):
    """As another user, to whom a folder does not belong."""
    if os.geteuid() == 0:
        os.chown(tmp_path / "mine", 1, 1)
        for parent in [tmp_path, *tmp_path.parents][:5]:  # pytest's own folders are private
            parent.chmod(0o755)
        os.setgroups([])
        os.setgid(65534)
        os.setuid(65534)
    out = tmp_path / "mine" / "out"
    refused(lambda: fresh().save(out), f"cannot write {out}: no permission to write to {tmp_path / 'mine'}")
    refused(lambda: run(tmp_path / "mine" / "run"), f"cannot write {tmp_path / 'mine' / 'run'}: Permission denied")
    os._exit(0)  # what measures coverage could not write either


def test_a_folder_of_another_user(tmp_path):
    (tmp_path / "mine").mkdir(mode=0o555)
    done(written_without_permission, tmp_path)
    assert list((tmp_path / "mine").iterdir()) == []


def written_to_a_disk_itself(place):
    """A mounted folder cannot be exchanged; it can be trained in."""
    disk = mounted(place, "8m")
    refused(lambda: fresh().save(disk), f"cannot write {disk}: a disk is mounted there; give a folder in it")
    run(disk)
    SuperNet.load(disk)


def test_a_mounted_disk_itself(place):
    done(written_to_a_disk_itself, place)
