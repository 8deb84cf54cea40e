"""The folder of a super-network: which facts of it are saved, and a network made of these."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from stratavit.artifacts import folder_format, moments
from stratavit.dropout_list.floors import floors_of
from stratavit.dropout_list.strata import Strata
from stratavit.elastic.token_places import check_tokens
from stratavit.elastic.tokens import merging_blocks
from stratavit.errors import ArtifactError, StrataViTError, described
from stratavit.models import changes, source_checks
from stratavit.models.freezing import frozen_names


def write(path: str | Path, net: Any, overwrite: bool, second: bool) -> None:
    """Writes the folder of a `SuperNet`, if `second` with second moments and the final mean.

    Raises:
        ArtifactError: It cannot be written, or what loading would build of it has other outputs.
    """
    if net.frozen_for_serving:
        raise ArtifactError(
            "the second moments were released by specialise(); save before, or specialise(moments=True)"
        )
    _ = net.cost  # follows a model that was changed
    source_checks.check(net.model)
    changes.check_followed(net)
    facts = {
        "method": net.method,
        "compensation": net.compensation if second or net.compensation != "full" else "mean",
        "model": net.description,
        "origin": net.origin,
        "data_config": net.data_config,
        "units": net.units if net.units == "gpu" else list(net.units),
        "frozen": frozen_names(net.model),
        "strata": None if net.strata is None else net.strata.to_json(),
        "provenance": net.provenance,
    }
    places = net.cost.places
    if floors := floors_of((*net.sites, *places)):
        facts["floors"] = floors
    if places and (net.joint_strata is not None or places[0].width != net.cost.patches):
        facts["patches"] = places[0].width  # what numbers of tokens refer to; else that of the input size
    if net.joint_strata is not None:
        facts["joint_strata"] = net.joint_strata.to_json()
    tensors = moments.to_tensors(net.elastic, net.final_mean, second)
    folder_format.write_saved(path, folder_format.SUPER, net.model, facts, overwrite, tensors)


def restore(net: Any, path: str | Path, content: Mapping[str, Any], second: bool) -> None:
    """Makes a `SuperNet` of a saved model what it was; without second moments ``full`` compensation becomes ``mean``.

    Raises:
        ArtifactError: The folder is damaged.
    """
    try:
        net.method = content.get("method", "default")
        net.compensation = content.get("compensation", net.compensation)
    except StrataViTError as error:
        raise ArtifactError(f"{Path(path) / folder_format.JSON_FILE}: {error}") from error
    if content["units"] == "gpu":
        net.set_units(units="gpu")
    else:
        net.set_units(*content["units"])
    net.provenance = dict(content.get("provenance", {}))
    tensors, source = folder_format.read_moments(path, content, second=second)
    final_mean = moments.from_tensors(net.elastic, net.sites, int(net.model.num_features), tensors, source)
    if second:
        net.final_mean = final_mean
    elif net.compensation == "full":
        net.compensation = "mean"
    source = str(Path(path) / folder_format.JSON_FILE)
    if content.get("patches") is not None:
        _count_tokens_of(net, content["patches"], source)
    _give_floors(net, content.get("floors", {}), source)
    if content.get("strata") is not None:
        net.strata = Strata.from_json(net.sites, content["strata"])
    if content.get("joint_strata") is not None:
        net.joint_strata = _joint_list(net, content["joint_strata"], source)


def _count_tokens_of(net: Any, patches: Any, source: str) -> None:
    """Makes numbers of tokens mean those of images of so many patches, the size that a list was made for."""
    if not net.cost.places or type(patches) is not int or not 1 <= patches <= 1 << 20:
        raise ArtifactError(f"{source}: patches should be their number in an image, got {described(patches)}")
    for block in merging_blocks(net.model).values():
        block.full = patches
    places = tuple(replace(place, width=patches) for place in net.cost.places)
    net._cost = replace(net.cost, places=places)


def _give_floors(net: Any, floors: Any, source: str) -> None:
    """Gives sites and places what dropout lists must keep of them."""
    places = net._cost.places
    full = {one.name: one.width for one in (*net.sites, *places)}
    for name, floor in floors.items() if isinstance(floors, dict) else [(described(floors), None)]:
        if name not in full or type(floor) is not int or not 1 <= floor <= full[name]:
            raise ArtifactError(f"{source}: floors: {described(name)} has a bad least width, {described(floor)}")
    net.sites = tuple(replace(site, floor=floors.get(site.name, 0)) for site in net.sites)
    places = tuple(replace(place, floor=floors.get(place.name, 0)) for place in places)
    net._cost = replace(net._cost, sites=net.sites, places=places)


def _joint_list(net: Any, rows: Any, source: str) -> Strata:
    found = Strata.from_json((*net.sites, *net.cost.places), rows)
    try:
        for position in range(len(found) + 1):
            check_tokens(net.cost.places, found.spec(position))
    except StrataViTError as error:
        raise ArtifactError(f"{source}: joint_strata: {error}") from error
    if net.strata is None or not len(found):
        raise ArtifactError(f"{source}: joint_strata needs entries, and strata; save the network again")
    return found
