"""The width of every site under a spec."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from stratavit.elastic.site import Site
from stratavit.errors import StrataViTError, described
from stratavit.spec import Spec


def full_spec(sites: Sequence[Site], spec: Mapping[str, int] | None) -> Spec:
    """A spec that names every site; those that `spec` does not name are at full width.

    Raises:
        StrataViTError: The spec names an unknown site or a width above the full one.
    """
    full = {site.name: site.width for site in sites}
    asked = spec if isinstance(spec, Spec) else Spec(spec or {})
    for name, width in asked.items():
        if name not in full:
            raise StrataViTError(
                f"spec: unknown site {described(name)}; the sites are {', '.join(list(full)[:2])}, ..."
            )
        if width > full[name]:
            raise StrataViTError(f"spec: {name} can keep at most {full[name]} channels, got {described(width)}")
        full[name] = width
    for name, width in asked.qk.items():
        whole = next(site.qk_width for site in sites if site.name == name)
        needed = whole if whole and full[name] else full[name]
        if width != needed:
            why = f"stays whole, {whole}" if whole else "is as wide as v"
            raise StrataViTError(f"spec: qk of {name} {why}; asked qk {described(width)} with v {full[name]}")
    return Spec(full)
