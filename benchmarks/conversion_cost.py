"""What a conversion costs against plain forward + backward over the same images, in one run; and extraction time.

    python benchmarks/conversion_cost.py [--images 1000] [--repeat 3]

Peak memory is the growth of the process's resident set, each measured in a fresh process.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from functools import partial

import timm
from common import anew, as_if_contracted, grown, interleaved, plain, real_batches, real_model, timed, write_results

import stratavit
from stratavit.calibration.statistics import collect

TITLES = {
    "plain": "plain forward + backward",
    "paper": "calibration pass, paper",
    "contract": "contract, default",
    "default": "contract + stratify, default",
}


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--images", type=int, default=1000)
    arguments.add_argument("--repeat", type=int, default=3)
    arguments.add_argument("--peak", choices=("none", *TITLES), default="none", help=argparse.SUPPRESS)
    args = arguments.parse_args()
    model = real_model("deit_tiny")
    batches = real_batches(model, "train", limit=args.images)
    net = stratavit.SuperNet(model)
    runs: dict[str, Callable[[], object]] = {
        "plain": lambda: plain(model, batches),
        "paper": lambda: collect(net.model, batches),
        "contract": lambda: stratavit.SuperNet(model).contract(batches),
        "default": lambda: stratavit.SuperNet(model).contract(batches).stratify(batches),
    }
    if args.peak != "none":
        print(grown(runs[args.peak]))
        return
    rows: list[dict[str, str | float]] = []
    plain(model, batches[:2])  # warm up
    seconds = interleaved(runs, args.repeat)
    memory = {name: int(anew("--images", str(args.images), "--peak", name)) for name in ("plain", "default")}
    base = seconds["plain"]
    for name in runs:
        median = seconds[name]
        rows.append({"what": f"{TITLES[name]}, {args.images} images, seconds", "value": median, "ratio": median / base})
        if name not in memory:
            continue
        rows.append(
            {"what": f"{TITLES[name]}, peak MiB", "value": memory[name] / 1024, "ratio": memory[name] / memory["plain"]}
        )
    rows += [{"what": what, "value": value, "ratio": ""} for what, value in extraction().items()]
    note = (
        f"Passes: medians of {args.repeat}; extraction: of 5; peaks: one fresh process each. "
        "Ratios to the plain pass (forward + backward, weights and all)."
    )
    write_results("conversion-cost", rows, note)


def extraction() -> dict[str, float]:
    """Seconds to extract from DeiT-Base, the numbers in it random: time does not depend on them."""
    net = as_if_contracted(timm.create_model("deit_base_patch16_224"))
    found = {}
    for compensation in ("mean", "full"):
        net.compensation = compensation
        for share in (0.75, 0.5, 0.25):
            spec = {site.name: int(share * site.width) for site in net.sites}
            times = []
            for _ in range(5):
                times.append(timed(partial(net.extract, spec=spec)))
            what = f"extract DeiT-Base, every width x {share}, compensation {compensation}, seconds"
            found[what] = statistics.median(times)
    return found


if __name__ == "__main__":
    main()
