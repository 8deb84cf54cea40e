"""Names of models: timm's, torchvision's, and as the hub writes them: ``user/name``, ``timm/NAME``, ``hf-hub:``."""

from __future__ import annotations

import difflib
import re
from pathlib import Path

import timm

from stratavit.errors import StrataViTError
from stratavit.interop import torchvision_vit

_REPOSITORY = re.compile(r"\w[\w.-]*/[\w.-]+")
_PREFIX = re.compile(r"hf[-_]hub:", re.IGNORECASE)


def repository_of(name: str | Path) -> str | None:
    """The repository ``user/name`` that a name stands for; None for any other name, and for a path that is there."""
    found = _PREFIX.sub("", str(name), count=1)
    return found if _REPOSITORY.fullmatch(found) and not Path(name).exists() else None


def timm_name(name: str) -> str:
    """What `timm.create_model` calls a model that is named as on the hub; any other name as it is.

    ``timm/NAME`` is timm's own ``NAME``, weights included; a tag that this timm does not know is left to the hub.
    """
    repository = _PREFIX.sub("", name, count=1)
    owner, _, model = repository.partition("/")
    if owner == "timm" and (not timm.is_model(model) or _has_weights(model)):
        return model
    return f"hf-hub:{repository}" if owner == "timm" or repository != name else name


def is_on_hub(name: str) -> bool:
    """Whether a name for timm is that of a repository on the hub."""
    return name.startswith("hf-hub:")


def check_name(name: str) -> None:
    """Checks that a model is known by its name, or that its name says that the hub has it.

    Raises:
        StrataViTError: It is not.
    """
    known = timm_name(name)
    if name in torchvision_vit.NAMES or is_on_hub(known) or timm.is_model(known):
        return
    close = difflib.get_close_matches(known, timm.list_models(), n=3)
    if not close and any(mark in known for mark in "/\\"):
        raise StrataViTError(
            f"{name} is neither a folder nor the name of a model; give one that was saved, a name in timm, or "
            "hf-hub:user/name for a repository on the hub"
        )
    hint = f"did you mean {' or '.join(close)}?" if close else "timm.list_models() names them all"
    raise StrataViTError(f"{name} is not a folder, and timm {timm.__version__} has no model named {known!r}; {hint}")


def _has_weights(name: str) -> bool:
    """Whether timm knows the weights that the tag of a name stands for."""
    architecture, _, tag = name.partition(".")
    return not tag or name in timm.list_pretrained(f"{architecture}.*")
