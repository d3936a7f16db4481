"""Parts of the service in this process: settings, untrusted images, and the cache of image states."""

import asyncio
import base64
import socket
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread

import PIL.Image
import pytest
import torch
from strange_pictures import encoded
from tiny_retrieval import images, make_model


pytest.importorskip("bentoml")

from trips_serving.batching import MAX_WAIT, BoundedOptimizer  # noqa: E402
from trips_serving.cache import ImageCaches, form, join, num_bytes, split  # noqa: E402
from trips_serving.errors import RequestError  # noqa: E402
from trips_serving.gate import Gate  # noqa: E402
from trips_serving.images import fetch, from_base64, is_public  # noqa: E402
from trips_serving.requests import images_of, items_of, request_models, texts_of, validate  # noqa: E402
from trips_serving.settings import Settings  # noqa: E402


def test_settings_come_from_the_environment():
    settings = Settings.from_environment(
        {
            "TRIPS_MODEL": " org/model ",
            "TRIPS_QUEUE": " 7 ",
            "TRIPS_ALLOW_URLS": "yes",
            "TRIPS_SCHEDULES": "fast=1:image:0.5,2:text:0.3; full=",
            "HOME": "/",
        }
    )
    assert settings.model == "org/model"
    assert settings.queue == 7 and settings.allow_urls and settings.max_texts == Settings().max_texts
    assert settings.schedules == {"fast": "1:image:0.5,2:text:0.3", "full": ""}
    assert not Settings.from_environment({"TRIPS_MODEL": "org/model"}).allow_urls


@pytest.mark.parametrize(
    "name, value",
    [
        ("TRIPS_QUEUE", "0"),
        ("TRIPS_ALLOW_URLS", "maybe"),
        ("TRIPS_READ_TIMEOUT", "nan"),
        ("TRIPS_CACHE_BYTES", "-1"),
        ("TRIPS_SCHEDULES", "default=2"),
        ("TRIPS_QUEUES", "7"),
    ],
)
def test_bad_settings_raise(name, value):
    with pytest.raises(ValueError, match=name):
        Settings.from_environment({"TRIPS_MODEL": "org/model", name: value})


def test_model_is_required(tmp_path):
    missing = [{}] + [{"TRIPS_MODEL": str(name)} for name in ("", " ", tmp_path, tmp_path / "missing", "./missing")]
    for environment in missing:
        with pytest.raises(ValueError, match="TRIPS_MODEL"):
            Settings.from_environment(environment)


def test_burst_does_not_delay_later_requests():
    optimizer = BoundedOptimizer(30.0, is_more_coming=lambda: True)
    for _ in range(50):
        optimizer.log_outbound(n=32, wait=4.0, duration=0.1)
    optimizer.trigger_refresh()
    assert 0 < optimizer.wait <= MAX_WAIT
    optimizer.is_more_coming = lambda: False
    assert optimizer.wait == 0


def answer_model():
    return request_models(Settings())["answer"]


@pytest.mark.parametrize(
    "body, name",
    [({"image": "", "questions": ["a", " "]}, "questions.1"), ({"image": "", "questions": ["a"], "n": 1}, "n")],
)
def test_bad_fields_are_named(body, name):
    with pytest.raises(RequestError) as refused:
        validate(answer_model(), body)
    assert refused.value.status == 422
    assert refused.value.message.startswith(f"{name}: ") and "\\S" not in refused.value.message


def test_many_bad_fields_raise_quickly():
    body = b"{" + b",".join(b'"%d":0' % number for number in range(400_000)) + b"}"
    gate = Gate(None, Settings(), None)
    start = time.process_time()
    with pytest.raises(RequestError) as refused:
        asyncio.run(gate.read("answer", {"type": "http", "headers": []}, body))
    assert refused.value.status == 422 and time.process_time() - start < 0.3
    with pytest.raises(RequestError) as refused:  # the maximum for a body of the longest texts
        asyncio.run(gate.read("answer", {"type": "http", "headers": []}, body[:500_000].rpartition(b",")[0] + b"}"))
    assert refused.value.status == 422


def test_colons_in_texts_do_not_count_as_fields():
    body = b'{"image": "", "questions": [' + b",".join([b'"' + b":" * 2000 + b'"'] * 32) + b"]}"
    request = asyncio.run(Gate(None, Settings(), None).read("answer", {"type": "http", "headers": []}, body))
    assert len(request.questions) == 32


def test_base64_and_data_urls():
    data = encoded(PIL.Image.new("RGB", (3, 3)))
    text = base64.b64encode(data).decode()
    assert from_base64(text) == from_base64(f"data:image/png;base64,{text}") == data
    for broken in ("a", "ä", text[:-1], "../../etc/passwd", "file:///etc/passwd"):
        with pytest.raises(RequestError, match="base64"):
            from_base64(broken)


@pytest.mark.parametrize(
    "address, expected",
    [
        ("93.184.215.14", True),
        ("2606:2800:21f:cb07:6820:80da:af6b:8b2c", True),
        *((address, False) for address in ("127.0.0.1", "10.1.2.3", "169.254.169.254", "100.64.0.1", "224.0.0.1")),
        *((address, False) for address in ("::1", "fe80::1%eth0", "fd00::1", "fec0::1")),
        ("64:ff9b::5db8:d70e", False),  # NAT64 of a public address
        # 127.0.0.1 and 169.254.169.254 inside IPv6
        *((address, False) for address in ("::ffff:127.0.0.1", "2002:7f00:1::", "64:ff9b::a9fe:a9fe", "::7f00:1")),
    ],
)
def test_public_addresses(address, expected):
    assert is_public(address) is expected


class Site(BaseHTTPRequestHandler):
    def do_GET(self):
        if self.path == "/elsewhere":
            self.send_response(302)
            self.send_header("Location", f"http://127.0.0.2:{self.server.server_port}/data")
            self.end_headers()
            return
        self.send_response(404 if self.path == "/missing" else 200)
        self.end_headers()
        self.wfile.write(b"x" * 1000)

    def log_message(self, *args):
        pass


@pytest.fixture
def site():
    server = ThreadingHTTPServer(("0.0.0.0", 0), Site)
    Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def test_urls_are_fetched_only_from_allowed_addresses(site):
    def only_first(address):
        return address == "127.0.0.1"

    def fetched(url, max_bytes=1000, is_allowed=only_first):
        return asyncio.run(fetch(url, max_bytes, timeout=5, is_allowed=is_allowed))

    assert fetched(f"{site}/data") == b"x" * 1000
    refusals = {
        (f"{site}/data", 999, only_first): 413,
        (f"{site}/missing", 1000, only_first): 422,
        (f"{site}/elsewhere", 1000, only_first): 422,  # the redirect leads to another address
        (f"{site}/data", 1000, is_public): 422,
        (site.replace("127.0.0.1", "localhost"), 1000, is_public): 422,  # a name is judged by its address
        ("http://", 1000, is_public): 422,
        ("http://no.such.host.invalid/", 1000, is_public): 422,
    }
    for (url, max_bytes, is_allowed), status in refusals.items():
        with pytest.raises(RequestError) as refused:
            fetched(url, max_bytes, is_allowed)
        assert refused.value.status == status, url
        assert "127.0.0" not in refused.value.message


def test_silent_site_times_out(monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}/"
        with pytest.raises(RequestError) as refused:
            asyncio.run(fetch(url, 1000, timeout=0.3, is_allowed=lambda address: True))
    assert refused.value.status == 422


@pytest.mark.parametrize("guidance", ["text", ["image", "text"], "image"])
@torch.no_grad()
def test_rows_of_image_caches_split_and_join(guidance):
    model = make_model(selection_guidance=guidance)
    whole = model.model.encode_images(images())
    rows = split(whole)
    order = torch.tensor([2, 0])
    joined = join([rows[2], rows[0]])
    tokens = torch.tensor([[1, 5, 2], [1, 8, 2]])
    expected = model.match(tokens, image_cache=whole, image_index=order).itm_logits
    torch.testing.assert_close(model.match(tokens, image_cache=joined).itm_logits, expected)
    assert len({form(row) for row in rows}) == 1
    # A row does not keep the memory of its batch.
    assert num_bytes(rows[0]) == sum(value.untyped_storage().nbytes() for value in rows[0].tensors.values())


@torch.no_grad()
def test_cache_evicts_the_least_recently_used():
    rows = split(make_model().model.encode_images(images()))
    size = num_bytes(rows[0])
    cache = ImageCaches(3 * size)
    for key in range(3):
        cache.put(key, rows[key])
    assert cache.get(0) is rows[0]
    cache.put(3, rows[3])
    assert [cache.get(key) is not None for key in range(4)] == [True, False, True, True]
    assert cache.bytes == 3 * size and len(cache) == 3
    cache.put(3, rows[3])
    assert cache.bytes == 3 * size
    nothing = ImageCaches(size - 1)
    nothing.put(0, rows[0])
    assert len(nothing) == 0 == nothing.bytes


def test_items_are_pairs_or_single_inputs():
    model = request_models(Settings())["match"]
    request = validate(model, {"images": ["a", "b"], "texts": ["x", "y", "z"]})
    assert images_of(request) == ["a", "b"] and texts_of(request) == ["x", "y", "z"]
    places = [item.place for item in items_of(request, [None] * 2, [None] * 3, in_pairs=True)]
    assert places == [{"image": image, "text": text} for image in range(2) for text in range(3)]
    alone = [item.place for item in items_of(request, [None] * 2, [None] * 3, in_pairs=False)]
    assert alone == [{"image": 0}, {"image": 1}, {"text": 0}, {"text": 1}, {"text": 2}]
    with pytest.raises(RequestError, match="image or a text"):
        items_of(request, [], [], in_pairs=False)
