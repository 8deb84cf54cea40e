"""Contraction keeps the function: largest logit difference against the source over 64 real images.

python benchmarks/preservation.py
"""

from __future__ import annotations

import torch
from common import MODELS, real_batches, real_model, write_results

import stratavit


def main() -> None:
    rows = []
    for name in MODELS:
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            model = real_model(name).to(dtype)
            images = torch.cat([x for x, _ in real_batches(model, "val", limit=64)]).to(dtype)
            net = stratavit.SuperNet(model).contract(real_batches(model, "train", limit=128), method="paper")
            with torch.inference_mode():
                source, contracted = model(images).float(), net(images).float()
            rows.append(
                {
                    "model": name,
                    "dtype": str(dtype).removeprefix("torch."),
                    "largest logit difference": float((source - contracted).abs().max()),
                    "largest logit": float(source.abs().max()),
                    "same top-1 %": 100 * float((source.argmax(1) == contracted.argmax(1)).float().mean()),
                }
            )
            print(rows[-1], flush=True)
    write_results("preservation", rows, "64 validation images; calibrated on 128 training images.")


if __name__ == "__main__":
    main()
