"""`Spec`: the width kept at every site. The only exchange format between the parts of StrataViT."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from operator import index
from types import MappingProxyType
from typing import Any, SupportsIndex

from stratavit.errors import StrataViTError, described, one_line

TOKENS = ".tokens"  # end of the names of places where blocks merge tokens


@dataclass(frozen=True, init=False, repr=False, eq=False)
class Spec(Mapping[str, int]):
    """Site name -> kept width: head_dim of an attention module, hidden_features of an MLP, patch tokens of a block.

    Where attention loses whole heads (`SuperNet`), its width is a number of heads.

    Sites that are not named stay at full width. A `Spec` is immutable and hashable; a plain dict is accepted wherever
    a `Spec` is. Whether names and widths fit a model is checked where they meet one (`SuperNet.resolve`).

    Where q and k stay uncut (qk-norm, cosine attention) or lose rotation pairs (rotary positions), a width is that of
    v. It may be given as ``{"qk": width, "v": width}`` as well, with the width that q and k have there, which says the
    same; of other attention modules ``qk`` and ``v`` are equal.

    Args:
        widths: For example ``{"blocks.0.attn": 32, "blocks.0.mlp": 384, "blocks.5.tokens": 100}``; keys are timm module
            paths, and those of blocks with ``.tokens`` where a block merges tokens.

    Raises:
        StrataViTError: A key is not a string, or a width is not an int >= 0.
    """

    _widths: dict[str, int]
    _qk: dict[str, int]

    def __init__(self, widths: Mapping[str, int | Mapping[str, int]] | None = None) -> None:
        vars(self).update(_widths={}, _qk={})
        if widths is not None and not isinstance(widths, Mapping):
            raise StrataViTError(f"spec: expected a mapping of site names to widths, got {type(widths).__name__}")
        for name, width in dict(widths or {}).items():
            if not isinstance(name, str):
                raise StrataViTError(f"spec: site names are strings such as 'blocks.0.attn', got {described(name)}")
            if isinstance(width, Mapping):
                if set(width) != {"qk", "v"}:
                    raise StrataViTError(
                        f"spec: {described(name)} needs 'qk' and 'v', or one width, got {described(dict(width))}"
                    )
                self._qk[name] = _width(name, width["qk"])
                width = width["v"]
            self._widths[name] = _width(name, width)

    @property
    def qk(self) -> Mapping[str, int]:
        """Widths of q and k, of those sites for which they were given; read-only."""
        return MappingProxyType(self._qk)

    def __getitem__(self, name: str) -> int:
        return self._widths[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._widths)

    def __len__(self) -> int:
        return len(self._widths)

    def __hash__(self) -> int:
        return hash(frozenset(self._widths.items()))

    def __eq__(self, other: object) -> bool:
        return self._widths == dict(other) if isinstance(other, Mapping) else NotImplemented

    def __le__(self, other: Mapping[str, int]) -> bool:
        """True when this sub-network lies inside `other`; both must name the same sites."""
        return self.keys() == other.keys() and all(width <= other[name] for name, width in self.items())

    def __repr__(self) -> str:
        return f"Spec({self._widths})"

    def to_json(self) -> str:
        """The widths as a JSON object."""
        return json.dumps(self._widths)

    @classmethod
    def from_json(cls, text: str) -> Spec:
        """Reads what `to_json` wrote.

        Raises:
            StrataViTError: The text is not a JSON object of widths.
        """
        try:
            widths: Any = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise StrataViTError(f"spec: not valid JSON ({one_line(error)})") from error
        if not isinstance(widths, dict):
            raise StrataViTError(f"spec: expected a JSON object of site: width, got {type(widths).__name__}")
        return cls(widths)


def _width(name: str, width: Any) -> int:
    if isinstance(width, bool) or not isinstance(width, SupportsIndex) or index(width) < 0:
        raise StrataViTError(
            f"spec: the width of {described(name)} must be a whole number >= 0, got {described(width)}"
        )
    return index(width)
