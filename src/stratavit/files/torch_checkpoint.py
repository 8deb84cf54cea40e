"""Files that `torch.save` wrote: their parts compared with their checksums, which `torch.load` does not do."""

from __future__ import annotations

import mmap
import pickletools
import zipfile
from pathlib import Path
from typing import IO, cast

from stratavit.errors import ArtifactError, shown

OLD_FORM = 5  # pickles before the tensors' numbers: two about the format, one about the machine, content, keys
_BYTEARRAY = b"bytearray\n"  # in a pickle: torch would make one of any length announced
_HOLDS = "holds a bytearray, which may be of any length; save a state dict of tensors only"


def check_archive(path: Path, prefix: str, advice: str = "copy it again") -> None:
    """Compares the parts of a file that `torch.save` wrote with their checksums, which `torch.load` does not.

    Files of the old form, which are no archives, have no checksums.

    Raises:
        ArtifactError: A part differs, or is compressed: torch never does that, and it may be of any size when unpacked.
            So may a bytearray be, which no state of tensors has, in files of either form.
    """
    if not path.is_file():
        raise ArtifactError(f"{prefix}{path} is not a file; {advice}")
    try:
        with path.open("rb") as file:
            if file.read(2) != b"PK":
                with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
                    if _announces(content):
                        raise ArtifactError(f"{prefix}{path} {_HOLDS}")
                return
        with zipfile.ZipFile(path) as archive:
            parts = archive.infolist()
            packed = any((p.compress_type, p.compress_size) != (zipfile.ZIP_STORED, p.file_size) for p in parts)
            if packed or sum(part.file_size for part in parts) > path.stat().st_size:
                raise zipfile.BadZipFile("compressed")
            pickled = [archive.read(part) for part in parts if part.filename.endswith(".pkl")]
            if any(_BYTEARRAY in content for content in pickled):
                raise ArtifactError(f"{prefix}{path} {_HOLDS}")
            broken = archive.testzip()
    except ArtifactError:
        raise
    except (OSError, ValueError, NotImplementedError, RuntimeError, EOFError, zipfile.BadZipFile) as error:
        raise ArtifactError(f"{prefix}{path} is damaged; {advice}") from error
    if broken is not None:
        raise ArtifactError(f"{prefix}{path} is damaged (the checksum of {shown(broken)} differs); {advice}")


def _announces(content: mmap.mmap) -> bool:
    """Whether a file of the old form makes bytearrays; its operations are looked at, and none is done.

    Raises:
        ValueError: A text or number in it does not end within the file.
    """
    for _ in range(OLD_FORM):
        if content.tell() < len(content):  # others have fewer
            operations = pickletools.genops(cast(IO[bytes], content))
            if any(step[0].name == "GLOBAL" and str(step[1]).endswith(" bytearray") for step in operations):
                return True
    return False
