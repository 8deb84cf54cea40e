"""The app of docs/serving.md, which `serving.py` measures: one network at several sizes, chosen by load."""

import io
from collections.abc import Mapping
from typing import Any

import anyio
import torch
from fastapi import FastAPI, HTTPException, Request
from PIL import Image
from timm.data import create_transform


def make_app(net: Any, sizes: Mapping[str, Any], threads: int = 2, longest_queue: int = 64) -> FastAPI:
    """Classifies the image in the body of ``POST /classify``; ``?size=NAME`` asks for one size.

    Args:
        net: A super-network, specialised for the sizes.
        sizes: Name -> spec, largest first.
        threads: Requests that are computed at the same time.
        longest_queue: Requests that may wait; more are refused with status 503.
    """
    names = list(sizes)
    transform = create_transform(**net.data_config, is_training=False)
    free = anyio.CapacityLimiter(threads)
    net.eval()
    app = FastAPI()

    @torch.inference_mode()
    def classify(body: bytes, spec: Any) -> dict[str, Any]:
        image = transform(Image.open(io.BytesIO(body)).convert("RGB"))
        probability, label = net(image[None], spec).softmax(dim=-1)[0].max(dim=-1)  # the size belongs to this call
        return {"label": int(label), "probability": float(probability)}

    @app.post("/classify")
    async def serve(request: Request, size: str = "") -> dict[str, Any]:
        if size and size not in sizes:
            raise HTTPException(400, f"size: expected one of {names}, got {size!r}")
        if free.statistics().tasks_waiting >= longest_queue:
            raise HTTPException(503, "too many requests wait; try again later")
        body = await request.body()
        async with free:  # waits for a thread; the size is chosen when the work begins
            waiting = free.statistics().tasks_waiting
            chosen = size or names[min(-(-waiting // threads), len(names) - 1)]
            try:
                found = await anyio.to_thread.run_sync(classify, body, sizes[chosen])
            except OSError as error:  # of Pillow
                raise HTTPException(400, "the body is not an image that Pillow can read") from error
        return {"size": chosen, **found}

    return app
