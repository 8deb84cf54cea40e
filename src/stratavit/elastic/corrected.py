"""What `SuperNet.specialise` keeps: compensated weights, with a note of what they were computed from."""

from __future__ import annotations

from torch import Tensor

from stratavit.errors import StrataViTError
from stratavit.utils.digest import digest_of


class Corrected:
    """The second map at a width, computed beforehand, and a note of what it was computed from.

    The note holds on to the memory of those tensors, so that no others can come to lie at their address. It notices
    tensors that were replaced, moved, cast or changed in place; `checked` compares the numbers themselves.

    Args:
        pair: Weight ``[C, H*w]`` and bias ``[C]``.
        basis: What they were computed from.
    """

    def __init__(self, pair: tuple[Tensor, Tensor], basis: list[Tensor]) -> None:
        self.pair = pair
        self._basis = [(tensor.detach(), version_of(tensor)) for tensor in basis]
        self._digest = digest_of(enumerate(basis))

    def unless_changed(self, basis: list[Tensor]) -> tuple[Tensor, Tensor] | None:
        """The pair, or None if it was computed from other tensors; changes through ``.data`` in place go unseen."""
        now = [(t.data_ptr(), t.dtype, t.shape, version_of(t)) for t in basis]
        then = [(t.data_ptr(), t.dtype, t.shape, version) for t, version in self._basis]
        return self.pair if now == then else None

    def checked(self, basis: list[Tensor], width: int) -> tuple[Tensor, Tensor]:
        """The pair, the numbers that it rests on compared; too slow for every pass, right for extraction.

        Raises:
            StrataViTError: They differ.
        """
        if digest_of(enumerate(basis)) != self._digest:
            raise stale(width)
        return self.pair


def stale(width: int) -> StrataViTError:
    """The error where a specialised width belongs to other weights."""
    return StrataViTError(
        f"width {width} was specialised for other weights (trained, moved, copied or cast since), and the moments "
        "are released; load the super-network again, move or cast it, then specialise"
    )


def version_of(tensor: Tensor) -> int:
    """How often it was changed in place; 0 where that is not counted."""
    return 0 if tensor.is_inference() else tensor._version
