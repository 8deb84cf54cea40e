"""The name under which timm finds the models that its own arguments cannot describe, in its registry.

``import stratavit`` runs this module: it imports neither torch nor timm, and the name is registered when timm is there.
"""

from __future__ import annotations

import sys
from typing import Any

from stratavit.interop.timm_name import NAME


def stratavit_vit(pretrained: bool = False, **kwargs: Any) -> Any:
    """timm's entry point: what ``timm.create_model`` calls for a folder whose ``config.json`` names it.

    Args:
        pretrained: Load the weights of the folder or repository.
        **kwargs: ``model_args`` of the ``config.json``, and what the caller of `timm.create_model` gives.

    Returns:
        A timm model, see `timm_entry.create`.
    """
    from stratavit.interop.timm_entry import create

    return create(pretrained, kwargs)


def register_with_timm() -> None:
    """Registers the name now if timm is imported already, else as soon as it is."""
    if "timm" in sys.modules:
        _register()
    elif not any(isinstance(finder, _FinderOfTimm) for finder in sys.meta_path):
        sys.meta_path.insert(0, _FinderOfTimm())


def _register() -> None:
    from timm.models import is_model, register_model

    if not is_model(NAME):
        register_model(stratavit_vit)


class _FinderOfTimm:
    """Finds timm as the other finders do, with a loader that registers the name; gone once timm is loaded."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        """The module's specification, of timm only."""
        if name != "timm":
            return None
        others = (finder.find_spec for finder in sys.meta_path if finder is not self and hasattr(finder, "find_spec"))
        spec = next(filter(None, (find(name, path, target) for find in others)), None)
        if spec is not None and spec.loader is not None:
            spec.loader = _LoaderOfTimm(spec.loader, self)  # type: ignore[assignment]
        return spec


class _LoaderOfTimm:
    """A loader that registers the name after it has run timm; all else is the loader's that it stands for."""

    def __init__(self, loader: Any, finder: _FinderOfTimm) -> None:
        self.loader, self.finder = loader, finder

    def __getattr__(self, name: str) -> Any:
        return getattr(self.loader, name)

    def exec_module(self, module: Any) -> None:
        """Runs timm, then registers the name."""
        module.__loader__ = module.__spec__.loader = self.loader  # nothing of this stays
        self.loader.exec_module(module)
        if self.finder in sys.meta_path:
            sys.meta_path.remove(self.finder)
        _register()
