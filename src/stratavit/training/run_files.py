"""What a training run writes to disk: its state in one file, its log, and the super-network at the end."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch

from stratavit.errors import ArtifactError, StrataViTError, described, one_line, out_of_memory, reason_of
from stratavit.files.atomic import readable_errors
from stratavit.files.folders import write_file
from stratavit.files.torch_checkpoint import check_archive
from stratavit.version import __version__

FORMAT = "stratavit/training-state/1"
STATE_FILE, LOG_FILE = "state.pt", "log.jsonl"
START_AGAIN = "start the training again in another folder"


def resume_hint(folder: Path, then: str = ", resume it to go on") -> str:
    """What is left of a run if it ends now, for a sentence; `then`: what to do with it."""
    resumable = (folder / STATE_FILE).exists()
    return f"the last state in {folder} is sound{then}" if resumable else "there is no state to resume yet"


def write_state(folder: Path, state: dict[str, Any]) -> None:
    """Replaces the state of a run, tensors and plain values; killed at any moment, the old or the new one is there."""
    temporary = folder / f".{STATE_FILE}.part"
    try:
        with readable_errors(folder / STATE_FILE, resume_hint(folder)):
            with temporary.open("wb") as file:
                torch.save({"format": FORMAT, "release": __version__, **state}, file)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(folder / STATE_FILE)
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


def read_state(folder: Path) -> dict[str, Any]:
    """Reads what `write_state` wrote; runs no code from the file.

    Raises:
        ArtifactError: There is none, it is damaged or of another version; or, later, a key is looked up that it lacks.
    """
    path = folder / STATE_FILE
    if not path.exists():
        raise ArtifactError(f"{folder} holds no interrupted training ({STATE_FILE}); start without resuming")
    try:
        check_archive(path, "", START_AGAIN)
        state = torch.load(path, map_location="cpu", weights_only=True)
    except ArtifactError:
        raise
    except Exception as error:  # what torch raises for damage differs with its place
        if out_of_memory(error):
            raise MemoryError(one_line(error)) from error
        raise ArtifactError(f"{path} is damaged; {START_AGAIN}") from error
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        raise ArtifactError(f"{path} is not a training state of this version of StrataViT ({FORMAT})")
    return _State(state, path)


class _State(dict[str, Any]):
    """A state that was read; a key that it lacks is reported in one sentence."""

    def __init__(self, state: dict[str, Any], path: Path) -> None:
        super().__init__(state)
        self.path = path

    def __missing__(self, key: str) -> Any:
        release = self.get("release", "an older release, before states named theirs")
        raise ArtifactError(
            f"{self.path} lacks {key!r}, which StrataViT {__version__} needs to go on: it was written by StrataViT "
            f"{described(release)}; resume with that release, or {START_AGAIN}"
        )


@contextmanager
def checkpoint_errors(folder: Path) -> Iterator[None]:
    """Turns what is raised for a state with values of other types or sizes than it should have into one sentence."""
    try:
        yield
    except StrataViTError:
        raise
    except (RuntimeError, ValueError, TypeError, KeyError, AttributeError, IndexError) as error:
        if out_of_memory(error):
            raise MemoryError(one_line(error)) from error
        raise ArtifactError(
            f"{folder / STATE_FILE} is not the state of such a run ({type(error).__name__}: {one_line(error)}); "
            + START_AGAIN
        ) from error


def publish(save: Callable[[Path], None], names: Sequence[str], folder: Path) -> None:
    """Puts files into a run's folder, next to its state and log.

    Args:
        save: Writes them to a folder of their own.
        names: Of the files; the one that makes them a result comes last. One that `save` did not write is removed.
        folder: Of the run.

    Raises:
        ArtifactError: They cannot be written.
    """
    temporary = folder / ".result"
    shutil.rmtree(temporary, ignore_errors=True)  # of a run that was killed while it moved them
    try:
        save(temporary)
        for name in names:
            if (temporary / name).exists():
                (temporary / name).replace(folder / name)
            else:
                (folder / name).unlink(missing_ok=True)
    except (OSError, ArtifactError) as error:
        reason = reason_of(error)
        raise ArtifactError(f"cannot write the result to {folder}: {reason}; {resume_hint(folder)}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


class Journal:
    """The log of a run, a file with one JSON object per line; every row has the number of epochs that had ended."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def append(self, row: dict[str, Any]) -> None:
        """Adds a row."""
        with readable_errors(self.path, resume_hint(self.path.parent)), self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")

    def rows(self) -> list[dict[str, Any]]:
        """All rows; lines that are not objects with kind and epoch, such as a last one cut short, are left out."""
        found = []
        text = self.path.read_text(encoding="utf-8", errors="replace") if self.path.exists() else ""
        for line in text.splitlines():
            with suppress(ValueError, RecursionError):
                row = json.loads(line)
                if isinstance(row, dict) and "kind" in row and _are_numbers(row.get("epoch"), row.get("seconds", 0)):
                    found.append(row)
        return found

    def rewind(self, epoch: int) -> None:
        """Drops what was written after so many epochs: a run that is resumed there writes it again."""
        kept = "".join(json.dumps(row) + "\n" for row in self.rows() if row["epoch"] <= epoch)
        write_file(self.path, kept.encode(), overwrite=True)


def _are_numbers(*values: Any) -> bool:
    return all(isinstance(value, int | float) for value in values)
