"""The app of docs/serving.md: outputs of the size that it names, and sizes that follow the load."""

import asyncio
import copy
import io
import runpy
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx2
import pytest
import torch
from helpers import make_net
from PIL import Image
from timm.data import create_transform

ROOT = Path(__file__).parents[1]
APP = ROOT / "benchmarks/serving_app.py"
make_app = runpy.run_path(str(APP))["make_app"]


@pytest.fixture
def served():
    """A network, its sizes, an image file and what the network outputs for it."""
    net = copy.deepcopy(make_net("plain", stratified=True))
    sizes = {share: net.spec(macs=share) for share in ("100%", "70%", "50%")}
    net.specialise(*sizes.values())
    file = io.BytesIO()
    Image.effect_noise((40, 40), 80).convert("RGB").save(file, "PNG")
    image = create_transform(**net.data_config, is_training=False)(Image.open(file))
    with torch.inference_mode():
        expected = {name: float(net(image[None], spec).softmax(-1).max()) for name, spec in sizes.items()}
    return net, sizes, file.getvalue(), expected


def held(net):
    """An event that calls of the network wait for."""
    go = threading.Event()

    def wait(*_):
        assert go.wait(30)

    net.register_forward_pre_hook(wait)
    return go


def finished(work):
    """Runs a coroutine in a thread of its own: in this one a browser's loop may be running."""
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(asyncio.run, work).result()


def ask(app, count, body, before=lambda: None, **params):
    """Replies to requests that are all sent before the first is computed."""

    async def run():
        async with httpx2.AsyncClient(transport=httpx2.ASGITransport(app), base_url="http://test") as client:
            sent = [asyncio.ensure_future(client.post("/classify", content=body, params=params)) for _ in range(count)]
            await asyncio.sleep(0.3)
            before()
            return await asyncio.gather(*sent)

    return finished(run())


def test_the_size_follows_the_number_of_requests_that_wait(served):
    net, sizes, body, expected = served
    go = held(net)
    replies = [reply.json() for reply in ask(make_app(net, sizes, threads=1), 6, body, go.set)]
    assert [reply["size"] for reply in replies] == ["50%", "50%", "50%", "50%", "70%", "100%"]
    for reply in replies:
        assert reply["probability"] == pytest.approx(expected[reply["size"]], abs=1e-6)


def test_sizes_that_are_asked_for_run_at_the_same_time(served):
    net, sizes, body, expected = served
    app = make_app(net, sizes, threads=4)

    async def run():
        async with httpx2.AsyncClient(transport=httpx2.ASGITransport(app), base_url="http://test") as client:
            asked = [name for _ in range(8) for name in sizes]
            return asked, await asyncio.gather(
                *(client.post("/classify", content=body, params={"size": name}) for name in asked)
            )

    asked, replies = finished(run())
    for name, reply in zip(asked, replies, strict=True):
        assert reply.json()["size"] == name
        assert reply.json()["probability"] == pytest.approx(expected[name], abs=1e-6)


def test_refusals(served):
    net, sizes, body, _ = served
    app = make_app(net, sizes, threads=1, longest_queue=2)
    assert [reply.status_code for reply in ask(app, 1, b"no image")] == [400]
    assert [reply.status_code for reply in ask(app, 1, body, size="40%")] == [400]
    go = held(net)
    assert [reply.status_code for reply in ask(app, 4, body, go.set)] == [200, 200, 200, 503]


def test_the_page_shows_the_app_that_was_measured():
    code = APP.read_text(encoding="utf-8").split('"""', 2)[2].strip()
    assert code.startswith("import io")
    assert code in (ROOT / "docs/serving.md").read_text(encoding="utf-8")
