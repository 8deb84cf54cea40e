"""Places where a model may merge tokens, and how many tokens every block has under a spec. Numbers alone.

A place is a block; its name in a spec is that of the block with ``.tokens``. Its width is the number of patch tokens
that it passes on at the model's input size (class and register tokens come on top and are never merged). Behind the
last block of a model that pools the class token nobody reads the patches: it may pass on none.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from stratavit.elastic.merging import least
from stratavit.elastic.site import Site, full_spec
from stratavit.errors import StrataViTError, described
from stratavit.spec import TOKENS, Spec

UNIT = 8  # tokens that are merged together in a dropout list


@dataclass(frozen=True)
class TokenPlace:
    """A block between whose attention and MLP tokens may be merged.

    Attributes:
        name: In a spec, ``blocks.5.tokens``.
        block: Name of the block.
        width: Patches of an image at the model's input size: all of them.
        prefix: Tokens in front of the patches, which are never merged.
        floor: `width` if no dropout list may merge here; else 0.
        unread: Nothing reads the patches that it passes on, so that 0 is a width, too.
    """

    name: str
    block: str
    width: int
    prefix: int = 0
    floor: int = 0
    unread: bool = False

    @property
    def steps(self) -> tuple[int, ...]:
        """Numbers of tokens at which units end, ascending, up to `width`."""
        ends = range(self.width % UNIT or UNIT, self.width + 1, UNIT)
        return (0, *ends) if self.unread else tuple(ends)

    @property
    def may_merge(self) -> bool:
        """Whether a dropout list may merge tokens here."""
        return not (self.floor or self.unread)

    def at_least(self, count: int) -> int:
        """The unit's end at a number of tokens, or the next one above it."""
        return next(step for step in self.steps if step >= count)


SiteOrPlace = Site | TokenPlace  # what an entry of a dropout list may shrink


def place_of(block: str, patches: int, prefix: int, unread: bool = False) -> TokenPlace:
    """The place of a block, for images of so many patches behind a prefix."""
    return TokenPlace(block + TOKENS, block, patches, prefix, unread=unread)


def tokens_along(places: Sequence[TokenPlace], widths: Mapping[str, int], patches: int) -> dict[str, tuple[int, int]]:
    """Patch tokens that attention and MLP of every block read, as `merging.MergingBlock` merges them.

    Args:
        places: In order of execution.
        widths: A spec; places that are not named merge nothing.
        patches: Of an image.

    Returns:
        Block -> (tokens of attention, tokens of the MLP).
    """
    found, now = {}, patches
    for place in places:
        asked, before = widths.get(place.name, place.width), now
        count = round(patches * asked / place.width)
        if count < now:
            now = 0 if _drops(place, asked) else max(count, least(now))
        found[place.block] = before, now
    return found


def _drops(place: TokenPlace, count: int) -> bool:
    """Whether a place passes on no patch, rather than merged ones."""
    return place.unread and count == 0


def check_tokens(places: Sequence[TokenPlace], widths: Mapping[str, int]) -> None:
    """Refuses counts that cannot be reached in one merge.

    Raises:
        StrataViTError: A place is to pass on more tokens than an image has, or less than a third of what it gets.
    """
    count = places[0].width if places else 0
    for place in places:
        asked = widths.get(place.name, place.width)
        if asked > place.width:
            raise StrataViTError(f"spec: {place.name} can keep at most {place.width} tokens, got {asked}")
        if asked < least(count) and not _drops(place, asked):
            raise StrataViTError(
                f"spec: {place.name} gets {count} tokens and can merge them into {least(count)} or more, got {asked}; "
                "merge some in an earlier block"
            )
        count = min(count, asked)


def resolve(sites: Sequence[Site], places: Sequence[TokenPlace], spec: Mapping[str, int] | None) -> Spec:
    """A spec that names every site, and the places that merge tokens; see `site.full_spec`.

    Raises:
        StrataViTError: The spec names an unknown site or place, a width above the full one, or see `check_tokens`.
    """
    asked = spec if isinstance(spec, Spec) else Spec(spec)
    tokens = {name: count for name, count in asked.items() if name.endswith(TOKENS)}
    if not tokens:
        return full_spec(sites, asked)
    known = {place.name: place for place in places}
    for name in tokens:
        if name in asked.qk:
            raise StrataViTError(f"spec: {described(name)} is a number of tokens; it has no 'qk' and 'v'")
        if name not in known:
            named = f"the places are {', '.join(list(known)[:2])}, ..." if known else "this model cannot merge tokens"
            raise StrataViTError(f"spec: unknown site {described(name)}; {named}")
    check_tokens(places, tokens)
    rest: dict[str, Any] = {name: width for name, width in asked.items() if name not in tokens}
    rest |= {name: {"qk": qk, "v": rest[name]} for name, qk in asked.qk.items()}
    merging = {name: count for name, count in tokens.items() if count < known[name].width}
    return Spec({**full_spec(sites, Spec(rest)), **merging})


def drops_patches(spec: Mapping[str, int]) -> bool:
    """Whether a spec asks a place to pass on no patch."""
    return any(count == 0 and name.endswith(TOKENS) for name, count in spec.items())


def can_merge(places: Sequence[TokenPlace], widths: Mapping[str, int]) -> bool:
    """Whether every place can merge what a spec asks of it at once."""
    try:
        check_tokens(places, widths)
    except StrataViTError:
        return False
    return True
