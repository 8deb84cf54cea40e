"""What can be cut: sites, their units, and the width of each under a spec."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal, get_args

from stratavit.choices import Units
from stratavit.errors import StrataViTError, described
from stratavit.spec import Spec

HEAD_DIM_UNIT = 8  # coordinates of the head width that are dropped together (paper, implementation details)
MLP_UNITS = 32  # groups that the MLP hidden width is cut into (paper, implementation details)
GPU_HEAD_DIM_UNIT = 32  # attention kernels run any head width up to a multiple of this at that multiple's speed
GPU_MLP_UNIT, GPU_WIDE_MLP_UNIT, GPU_WIDE = 64, 128, 2048  # tiles of matrix products; the larger from this width on
ROTARY_STEPS = 2, 4, 6, 8  # widths of v along which rotation pairs leave; measured (benchmarks/rotary.py)

Kind = Literal["attention", "mlp"]
UnitSizes = tuple[int, int] | Literal["gpu"]  # coordinates of a head width and groups of a hidden width, or see below


@dataclass(frozen=True)
class Site:
    """One module that can be cut.

    Attributes:
        name: timm module path, for example ``blocks.0.attn``.
        kind: ``attention`` (width is the head_dim) or ``mlp`` (width is the hidden_features).
        width: Full width.
        heads: Number of heads; 1 for an MLP.
        dim: Token width C that the module reads and writes.
        in_biases: Number of the maps into the channels that have a bias.
        out_bias: Whether proj / fc2 has a bias.
        steps: Widths at which units end, ascending from 0 to `width`; unit i is ``[steps[i], steps[i + 1])``.
        maps: Linear maps into the channels: 3 for q, k and v, 1 for an MLP or for v alone, 2 for a gated MLP.
        qk_width: Full width per head of q and k where `width` is that of v alone; else 0.
        rotary: q and k are cut by rotation pairs, see `qk_at`; else they stay at `qk_width`.
        qk_biases: Number of the two that have a bias, if they are cut by pairs.
        fixed_params: Parameters that the module has at every width above 0.
        floor: Channels that every network of a dropout list keeps; 0 is none.
        whole_heads: Attention whose width is a number of heads; `heads` is then the head_dim, which stays.
    """

    name: str
    kind: Kind
    width: int
    heads: int
    dim: int
    in_biases: int
    out_bias: bool
    steps: tuple[int, ...]
    maps: int
    qk_width: int = 0
    fixed_params: int = 0
    rotary: bool = False
    qk_biases: int = 0
    floor: int = 0
    whole_heads: bool = False

    @property
    def least(self) -> int:
        """Least width on a dropout list: the first unit's end that is not below the floor."""
        return self.steps[bisect_left(self.steps, self.floor)]

    def qk_at(self, width: int) -> int:
        """Width per head of q and k where that of v is `width`."""
        if not self.qk_width or not width:
            return width
        return rotary_width(width, self.qk_width) if self.rotary else self.qk_width

    def with_whole_scores(self) -> Site:
        """The site as long as q and k are whole: what a list that does not know of rotation pairs can cut."""
        if not self.rotary:
            return self
        steps = tuple(step for step in self.steps if not 0 < step < min(self.width, ROTARY_STEPS[-1]))
        return replace(self, steps=steps, rotary=False)

    @property
    def last_unit(self) -> int:
        """Width that is left before a dropout list drops the module as a whole, if the floor lets it."""
        return max(self.steps[1], self.least)


def rotary_width(width: int, full: int) -> int:
    """Width of q and k where v has a width: the full one until v is at the last of `ROTARY_STEPS`, then its share."""
    return min(full, 2 * math.ceil(full * width / (2 * min(full, ROTARY_STEPS[-1]))))


def attention_steps(head_dim: int, unit: int = HEAD_DIM_UNIT) -> tuple[int, ...]:
    """Unit ends of a head width: multiples of `unit`, then the full width."""
    return (*range(0, head_dim, unit), head_dim)


def rotary_steps(head_dim: int, unit: int = HEAD_DIM_UNIT) -> tuple[int, ...]:
    """The same where q and k are cut by rotation pairs, which need units of their own at the end."""
    return tuple(sorted({*attention_steps(head_dim, unit), *(step for step in ROTARY_STEPS if step < head_dim)}))


def mlp_steps(hidden: int, units: int = MLP_UNITS) -> tuple[int, ...]:
    """Unit ends of an MLP hidden width: `units` groups as equal as whole numbers allow."""
    units = max(1, min(units, hidden))  # more would be the same: every channel its own
    return tuple(sorted({hidden * i // units for i in range(units + 1)}))


def gpu_steps(site: Site) -> tuple[int, ...]:
    """Unit ends at which a GPU gains: head widths in multiples of 32, hidden widths in multiples of 64 or 128.

    A head of at most 32 coordinates is cut in units of 16, which its linear maps gain from.
    """
    if site.whole_heads:
        return site.steps
    if site.kind == "attention":
        unit = GPU_HEAD_DIM_UNIT if site.width > GPU_HEAD_DIM_UNIT else GPU_HEAD_DIM_UNIT // 2
    else:
        unit = GPU_WIDE_MLP_UNIT if site.width >= GPU_WIDE else GPU_MLP_UNIT
    return attention_steps(site.width, unit)


def units_named(name: str) -> UnitSizes:
    """The units of a name in `choices.Units`.

    Raises:
        StrataViTError: It is not one of these.
    """
    if name not in get_args(Units):
        raise StrataViTError(f"units: expected {' or '.join(get_args(Units))}, got {described(name)}")
    return "gpu" if name == "gpu" else (HEAD_DIM_UNIT, MLP_UNITS)


def with_units(sites: Sequence[Site], units: UnitSizes) -> tuple[Site, ...]:
    """The same sites, cut in other units: groups of coordinates of a head, and a number of groups of hidden ones.

    Args:
        sites: The sites.
        units: The two numbers, or ``gpu``, see `gpu_steps`; q and k of rotary attention then stay whole.

    Raises:
        StrataViTError: A number is not a whole number of at least 1.
    """
    if units == "gpu":
        return tuple(replace(site, steps=gpu_steps(site)) for site in sites)
    head_dim_unit, mlp_units = units
    for name, value in (("head_dim_unit", head_dim_unit), ("mlp_units", mlp_units)):
        if type(value) is not int or value < 1:
            raise StrataViTError(f"{name}: expected a whole number of at least 1, got {value!r}")
    steps = {"attention": lambda w: attention_steps(w, head_dim_unit), "mlp": lambda w: mlp_steps(w, mlp_units)}
    cut = []
    for site in sites:
        own = rotary_steps(site.width, head_dim_unit) if site.rotary else steps[site.kind](site.width)
        cut.append(site if site.whole_heads else replace(site, steps=own))
    return tuple(cut)


def full_spec(sites: Sequence[Site], spec: Mapping[str, int] | None) -> Spec:
    """A spec that names every site; those that `spec` does not name are at full width.

    Raises:
        StrataViTError: The spec names an unknown site or a width above the full one.
    """
    known = {site.name: site for site in sites}
    asked = spec if isinstance(spec, Spec) else Spec(spec)
    for name, width in asked.items():
        if name not in known:
            first = ", ".join(list(known)[:2])
            raise StrataViTError(f"spec: unknown site {described(name)}; the sites are {first}, ...")
        if width > known[name].width:
            raise StrataViTError(f"spec: {name} can keep at most {known[name].width} channels, got {described(width)}")
    for name, width in asked.qk.items():
        site, v = known[name], asked[name]
        if width != site.qk_at(v):
            uncut = f"is never cut, {site.qk_width}"
            why = f"is {site.qk_at(v)} there" if site.rotary else uncut if site.qk_width else "is as wide as v"
            raise StrataViTError(f"spec: qk of {name} {why}; asked qk {described(width)} with v {v}")
    return Spec({site.name: site.width for site in sites} | dict(asked))
