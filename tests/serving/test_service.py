"""The service in a separate process, over loopback."""

import base64
import contextlib
import json
import os
import re
import resource
import select
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import PIL.Image
import PIL.ImageDraw
import psutil
import pytest
from documents import PAGES
from loopback_hub import LoopbackHub
from places import ROOT
from programs import output_of
from running_service import CHECKPOINT, RunningService, free_port, wait_until
from strange_pictures import bomb, encoded

from modeling_trips import TripsForQuestionAnswering, TripsProcessor, TripsVisualQuestionAnsweringPipeline


pytestmark = pytest.mark.slow
QUESTIONS = ["what color is the shape?", "is there a circle?", "what shape is in the image?"]
COLORS = ["teal", "red", "blue", "black", "green", "gray", "brown", "yellow"]


def picture(color):
    image = PIL.Image.new("RGB", (64, 64), "white")
    PIL.ImageDraw.Draw(image).rectangle((16, 20, 48, 52), fill=color)
    return image


def as_text(image):
    return base64.b64encode(image if isinstance(image, bytes) else encoded(image)).decode()


def ask(color, **fields):
    return {"image": as_text(picture(color)), "questions": QUESTIONS, **fields}


@pytest.fixture(scope="module")
def library():
    """Return the pipeline of the checkpoint at the schedule of the shared service."""
    model = TripsForQuestionAnswering.from_pretrained(CHECKPOINT, schedule="2:text:0.25")
    return TripsVisualQuestionAnsweringPipeline(model=model, processor=TripsProcessor.from_pretrained(CHECKPOINT))


def check_answers(found, expected):
    for answers, expected_answers in zip(found, expected, strict=True):
        for one, expected_one in zip(answers, expected_answers, strict=True):
            assert one["answer"] == expected_one["answer"]
            assert one["score"] == pytest.approx(expected_one["score"], abs=1e-4)


def test_concurrent_answers_match_the_library(service, library):
    with ThreadPoolExecutor(len(COLORS)) as pool:
        replies = list(pool.map(lambda color: service.post("answer", ask(color, top_k=2)), COLORS))
    for color, reply in zip(COLORS, replies):
        assert reply.status_code == 200, reply.text
        check_answers(reply.json()["answers"], library(picture(color), QUESTIONS, top_k=2))


def test_a_data_url_is_an_image_and_the_best_answer_has_its_kept_patches(service, library):
    image = picture("red")
    url = f"data:image/png;base64,{as_text(image)}"
    for _ in range(2):  # also of an image whose states are cached
        reply = service.post("answer", ask("red", image=url, kept_patches=True, top_k=2))
        found = reply.json()["answers"]
        check_answers(found, library(image, QUESTIONS, top_k=2))
        for best, other in found:
            assert len(best["kept_patches"]) == 36 and "kept_patches" not in other  # a quarter of 144


def test_an_answer_below_the_threshold_is_unsure_and_unknown_words_are_named(service):
    reply = service.post("answer", ask("red", questions=["what color is the 色 kite?"], threshold=1.0))
    ((answer,),) = reply.json()["answers"]
    assert answer["answer"] == "unsure" and 0 < answer["score"] < 1 and "[UNK]" in answer["unknown_words"]
    assert not {"", "what", "color", "the", "?"} & {*answer["unknown_words"]} and len(answer["unknown_words"]) > 1


HEAD = b"POST /answer HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n"
AS_JSON = {"headers": {"content-type": "application/json"}}
BAD = {
    "invalid JSON": ({"content": b"{", **AS_JSON}, 400),
    "bytes that are no text": ({"content": b"\xff\xfe\x00", **AS_JSON}, 400),
    "no content type": ({"content": b"{}"}, 415),
    "a form": ({"data": {"questions": "a"}, "files": [("image", b"a")]}, 415),
    "a list": ({"json": []}, 422),
    "no image": ({"json": {"questions": ["a"]}}, "image"),
    "a number": ({"json": ask("red", questions=[7])}, "questions.0"),
    "an empty question": ({"json": ask("red", questions=["a", " "])}, "questions.1"),
    "too many questions": ({"json": ask("red", questions=["a"] * 5)}, "questions"),
    "a question of too many tokens": ({"json": ask("red", questions=["a", "is " * 500])}, "questions.1"),
    "an unknown field": ({"json": ask("red", n=1)}, "n"),
    "many unknown fields": ({"json": dict.fromkeys(map(str, range(15_000)), 0)}, "0"),
    "a path": ({"json": ask("red", image="/etc/passwd")}, "image"),
    "a URL": ({"json": ask("red", image="http://127.0.0.1/x.png")}, "image"),
    "a bomb": ({"json": ask("red", image=as_text(bomb(30_000, 30_000)))}, 413),
    "a large body": ({"content": b"x" * 300_001, **AS_JSON}, 413),
    "an enormous body": ({"content": (b"x" * 65_536 for _ in range(200)), **AS_JSON}, 413),
    "a pickle": ({"content": b"\x80\x04N.", "headers": {"content-type": "application/vnd.bentoml+pickle"}}, 415),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_requests_are_rejected(service, name):
    options, expected = BAD[name]
    try:
        reply = service.post("answer", **options)
    except (httpx.WriteError, httpx.ReadError):
        assert name == "an enormous body"  # the service stopped listening
    else:
        error = reply.json()["error"]
        if isinstance(expected, int):
            assert reply.status_code == expected, error
        else:  # the name of a field
            assert reply.status_code == 422, error
            assert error.startswith(f"{expected}: ")
        assert error
        assert "Traceback" not in reply.text
        assert ".py" not in reply.text
    assert service.post("answer", ask("red")).status_code == 200


DEPLOY = next(page for page in PAGES if str(page) == "docs/deploy.md")


def test_documented_client(service, capsys):
    (client,) = [block for block in DEPLOY.blocks("python") if "urlopen" in block]
    modules = re.findall(r"^(?:import|from) (\w+)", client, re.MULTILINE)
    assert set(modules) <= sys.stdlib_module_names
    exec(client.replace("127.0.0.1:3000", f"127.0.0.1:{service.port}"), {})
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[-2] for line in lines] == ["purple", "no"]


def test_documented_command_sends_a_photo(service, tmp_path):
    """A photo of 200 KB is more than one argument of a command may hold."""
    (command,) = [block for block in DEPLOY.blocks("bash") if "curl" in block]
    command = command.replace("127.0.0.1:3000", f"127.0.0.1:{service.port}")

    def answers(folder):
        (found,) = json.loads(output_of("sh", "-c", command, cwd=folder))["answers"]
        return [one["answer"] for one in found]

    assert answers(ROOT)[0] == "purple"
    noise = PIL.Image.merge("RGB", [PIL.Image.effect_noise((280, 280), 100) for _ in range(3)])
    photo = tmp_path / "examples/scene.png"
    photo.parent.mkdir()
    noise.save(photo)
    assert photo.stat().st_size > 200_000
    assert len(answers(tmp_path)) == 2


def test_other_places_and_methods(service):
    for method, path, status in (
        ("GET", "answer", 405),
        ("POST", "match", 404),
        ("POST", "nowhere", 404),
        ("POST", "answer/", 404),
        ("GET", "livez", 200),
        ("GET", "metrics", 200),
        ("GET", "openapi.json", 200),
        ("GET", "docs", 200),
        ("GET", "", 200),
    ):
        reply = httpx.request(method, f"{service.url}/{path}")
        assert reply.status_code == status, path
        if status != 200:
            assert reply.json()["error"]
    reply = service.post("answer", ask("red"), headers={"host": "evil.example"})
    assert reply.status_code == 400
    # Metrics for every unknown path would fill the memory.
    for number in range(20):
        assert httpx.get(f"{service.url}/made-up-{number}").status_code == 404
    assert "made-up" not in httpx.get(f"{service.url}/metrics").text


@pytest.mark.parametrize("path, script", [("/", "page.js"), ("/docs", "docs.js")])
def test_pages_load_nothing_from_other_hosts(service, path, script):
    page = httpx.get(service.url + path)
    policy = page.headers["content-security-policy"]
    assert policy.startswith("default-src 'none'")
    assert "http" not in policy
    assert "*" not in policy
    assert "://" not in page.text
    names = re.findall(r'(?:src|href)="\./([^"]*)"', page.text)
    assert {"page.css", script, "", "docs", "openapi.json"} == set(names)
    for name in names:
        reply = httpx.get(f"{service.url}/{name}").raise_for_status()
        assert "://" not in reply.text


@pytest.fixture
def page(browser_page):
    """Return a page of a browser; what it says must be no error."""
    messages = []
    browser_page.on("console", lambda message: messages.append(message))
    yield browser_page
    assert not [message.text for message in messages if message.type == "error"]


def test_the_page_answers_about_an_uploaded_image(service, library, page, tmp_path):
    path = tmp_path / "red.png"
    path.write_bytes(encoded(picture("red")))
    requests = []
    page.on("request", lambda request: requests.append(request.url))
    page.goto(service.url)
    page.set_input_files("input[name=image]", path)
    page.fill("textarea[name=questions]", "\n".join(QUESTIONS))
    page.wait_for_selector("label img")
    page.click("button")
    page.wait_for_selector("figure:nth-of-type(3) canvas")
    pixels = page.evaluate("[...document.querySelector('canvas').getContext('2d').getImageData(0, 0, 64, 64).data]")
    opacities = pixels[3::4]
    assert 0 < opacities.count(255) < len(opacities) / 2  # the service keeps a quarter, and draws the rest faded
    (best, *_), *_ = library(picture("red"), QUESTIONS, top_k=1)
    assert f'"{best["answer"]}"' in page.inner_text("pre")
    assert CHECKPOINT.name in page.title()
    assert all(url.startswith((service.url, "data:")) for url in requests)


def test_the_documentation_shows_all_fields_and_a_command_that_runs(service, page):
    document = httpx.get(f"{service.url}/openapi.json").json()
    page.goto(f"{service.url}/docs")
    page.wait_for_selector("text=POST /answer")
    fields = document["components"]["schemas"]["AnswerRequest"]["properties"]
    assert page.locator("td code").all_text_contents() == [*fields, "answers"]
    assert "4" in page.inner_text("tr:has(code:text-is('questions'))")  # TRIPS_MAX_TEXTS of this service
    headings = page.locator("h2").all_text_contents()
    assert {heading.split()[1] for heading in headings} == set(document["paths"])
    assert json.loads(output_of("sh", "-c", f"{page.inner_text('pre')} --silent"))["answers"]


def test_slow_bodies_time_out(service):
    slow = [socket.create_connection(("127.0.0.1", service.port), timeout=30) for _ in range(50)]
    for connection in slow:
        connection.sendall(HEAD % 9 + b"{")
    assert service.post("answer", ask("blue")).status_code == 200
    for connection in slow:
        assert connection.recv(1000).startswith(b"HTTP/1.1 408")
        connection.close()


def test_silent_connections_do_not_stop_the_service(tmp_path):
    """More connections than a worker may open files, without a byte or with half a header."""
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (4096, limits[1]))
    with RunningService(tmp_path / "log") as service:
        for child in psutil.Process(service.process.pid).children(recursive=True):
            resource.prlimit(child.pid, resource.RLIMIT_NOFILE, (1024, 1024))
        silent = [socket.create_connection(("127.0.0.1", service.port), timeout=30) for _ in range(1100)]
        for connection in silent[:300]:
            connection.sendall(b"POST /answer HTTP/1.1\r\nHost: localhost\r\nX-")
        start = time.monotonic()
        assert service.post("answer", ask("red")).status_code == 200
        assert time.monotonic() - start < 30
        assert [connection.recv(1) for connection in silent] == [b""] * 1100  # closed by the service
        for connection in silent:
            connection.close()
        assert len(service.log.read_text()) < 2000
    resource.setrlimit(resource.RLIMIT_NOFILE, limits)


NGINX = shutil.which("nginx", path=f"{os.environ['PATH']}:/usr/sbin")


@pytest.mark.skipif(NGINX is None, reason="nginx is not installed")
def test_slow_clients_do_not_reach_the_service_behind_the_proxy(service, tmp_path):
    """50 clients send bodies byte by byte, 50 never read their replies; all have one address. Another has no delay."""
    port = free_port()
    proxy = (ROOT / "serving/nginx.conf").read_text()
    proxy = proxy.replace("127.0.0.1:8080", f"127.0.0.1:{port}")
    proxy = proxy.replace("127.0.0.1:3000", f"127.0.0.1:{service.port}")
    (tmp_path / "proxy.conf").write_text(proxy)
    names = ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    folders = "".join(f"{name}_temp_path {tmp_path}/{name};" for name in names)
    (tmp_path / "nginx.conf").write_text(
        f"daemon off; pid {tmp_path}/pid; events {{}} "
        f"http {{ access_log off; {folders} include {tmp_path}/proxy.conf; }}"
    )
    worker = psutil.Process(service.process.pid)
    processes = [worker, *worker.children(recursive=True)]

    def num_connections():
        found = [one for process in processes for one in process.net_connections("tcp")]
        return sum(one.status == psutil.CONN_ESTABLISHED and one.laddr.port == service.port for one in found)

    nginx = subprocess.Popen([NGINX, "-e", tmp_path / "errors", "-c", tmp_path / "nginx.conf"])
    try:
        wait_until((tmp_path / "pid").exists, seconds=30)
        sending = [socket.create_connection(("127.0.0.1", port)) for _ in range(50)]
        for connection in sending:
            connection.setblocking(False)
            connection.send(HEAD % 99)
        asking = [socket.create_connection(("127.0.0.1", port)) for _ in range(50)]
        for connection in asking:
            connection.setblocking(False)
            connection.send(b"GET /page.js HTTP/1.1\r\nHost: localhost\r\n\r\n" * 1000)
        honest = httpx.Client(transport=httpx.HTTPTransport(local_address="127.0.0.2"), timeout=30)
        for _ in range(4):
            for connection in sending:
                with contextlib.suppress(OSError):  # more than 20 of an address are refused
                    connection.send(b" ")
            reply = honest.post(f"http://127.0.0.1:{port}/answer", json=ask("red"))
            assert reply.status_code == 200
            assert num_connections() <= 1
            time.sleep(1)
        answered, _, _ = select.select(sending, [], [], 0)
        refused = [connection for connection in answered if b" 429 " in connection.recv(100)]
        assert len(refused) >= 30
    finally:
        nginx.terminate()
        nginx.wait(30)
    assert service.post("answer", ask("red")).status_code == 200


def test_requests_of_clients_that_left_are_not_computed(tmp_path):
    with RunningService(tmp_path / "log", max_batch_size=1) as service:
        questions = [f"is it {number}?" for number in range(32)]
        body = json.dumps(ask("red", questions=questions, top_k=10)).encode()
        leaving = [socket.create_connection(("127.0.0.1", service.port)) for _ in range(60)]
        for connection in leaving:
            connection.sendall(HEAD % len(body) + body)
        wait_until(lambda: service.metric("trips_requests_in_progress") >= 40)
        for connection in leaving:
            connection.close()
        assert service.post("answer", ask("blue")).status_code == 200
        # Nothing waits behind them: their questions would take longer.
        wait_until(lambda: service.metric("trips_requests_in_progress") == 0, seconds=5)


def test_random_requests_from_the_openapi_document(service, tmp_path):
    pytest.importorskip("schemathesis")
    command = [
        os.path.join(os.path.dirname(sys.executable), "schemathesis"),
        "run",
        f"{service.url}/openapi.json",
        "--checks=not_a_server_error,status_code_conformance,content_type_conformance,response_schema_conformance",
        "--max-examples=300",
        "--phases=examples,fuzzing",
        "--mode=all",
        "--include-path=/answer",
        "--seed=1",
        "--no-color",
    ]
    output_of(*command, cwd=tmp_path)
    assert service.post("answer", ask("green")).status_code == 200
    assert "Traceback" not in service.log.read_text()


def test_large_images_delay_only_decoding(tmp_path):
    """Requests that wait too long for a decoder are refused; requests without a new image do not wait."""
    large = as_text(PIL.Image.new("RGBA", (3000, 3000), (1, 2, 3, 100)))
    with RunningService(tmp_path / "log", max_latency_ms=1000) as service:

        def seconds():
            start = time.monotonic()
            assert service.post("answer", ask("red")).status_code == 200
            return time.monotonic() - start

        seconds()  # the first one is slower
        lone = [seconds() for _ in range(5)]
        with ThreadPoolExecutor(16) as pool:
            waiting = [pool.submit(service.post, "answer", ask("red", image=large)) for _ in range(16)]
            times = []
            while not all(one.done() for one in waiting):
                times.append(seconds())
        replies = [one.result() for one in waiting]
        assert {reply.status_code for reply in replies} <= {200, 503}
        check_refused([reply for reply in replies if reply.status_code == 503])
        assert statistics.median(times) < 5 * max(lone)
        assert service.post("answer", ask("blue")).status_code == 200
        assert "Traceback" not in service.log.read_text()


def test_incomplete_body_does_not_delay_shutdown(tmp_path):
    with RunningService(tmp_path / "log") as service:
        with socket.create_connection(("127.0.0.1", service.port)) as connection:
            connection.sendall(b"POST /answer HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1000\r\n\r\n{")
        assert service.post("answer", ask("red")).status_code == 200
        start = time.monotonic()
        service.process.send_signal(signal.SIGTERM)
        assert service.process.wait(300) == 0
        assert time.monotonic() - start < 20


def check_refused(replies):
    assert replies
    for reply in replies:
        assert reply.headers["retry-after"] == "1"
        assert reply.json()["error"]


@pytest.mark.parametrize(
    "name, value, workers", [("model", "no-one/nothing", 1), ("device", "warp", 2), ("queue", 0, 1)]
)
def test_broken_service_exits_with_an_error(tmp_path, name, value, workers):
    service = RunningService(tmp_path / "log", workers=workers, **{name: value})
    service.start()
    try:
        assert service.process.wait(300) == 1
    finally:
        service.process.kill()
    last = service.log.read_text().splitlines()[-1]
    assert f"TRIPS_{name.upper()}={value}" in last


def test_a_deleted_folder_is_not_looked_up_on_the_hub(tmp_path):
    """Its relative path has the form of a name on the Hub. The next worker ends the service."""
    shutil.copytree(CHECKPOINT, tmp_path / "owner/name")
    with LoopbackHub() as hub:
        service = RunningService(tmp_path / "log", model="owner/name")
        service.folder = tmp_path
        service.environment |= hub.client_environment(tmp_path / "home")
        with service:
            shutil.rmtree(tmp_path / "owner/name")
            (worker,) = service.workers()
            worker.kill()
            assert service.process.wait(300) == 1
        assert not hub.requests
    assert str(tmp_path / "owner/name") in service.log.read_text().splitlines()[-1]


def test_full_queue_rejects_further_requests(tmp_path):
    with RunningService(tmp_path / "log", queue=4) as service:
        with ThreadPoolExecutor(48) as pool:
            replies = list(pool.map(lambda _: service.post("answer", ask("red")), range(96)))
        answered = [reply for reply in replies if reply.status_code == 200]
        refused = [reply for reply in replies if reply.status_code == 503]
        assert len(answered) >= 4
        assert len(answered) + len(refused) == 96
        check_refused(refused)


@pytest.mark.parametrize("workers", [1, 2])
def test_shutdown_drains_accepted_requests(tmp_path, workers):
    with RunningService(tmp_path / "log", max_batch_size=2, workers=workers) as service:
        with ThreadPoolExecutor(24) as pool:
            waiting = [pool.submit(service.post, "answer", ask(color, top_k=10)) for color in COLORS * 3]
            until = time.monotonic() + 300
            while (accepted := service.metric("trips_requests_in_progress")) < 8:
                assert time.monotonic() < until
                assert not all(one.done() for one in waiting)
            service.process.send_signal(signal.SIGTERM)
            outcomes = [one.exception() or one.result().status_code for one in waiting]
        assert service.process.wait(300) == 0
        # Connections without a complete request are closed; requests in flight are answered.
        assert outcomes.count(200) >= accepted
        assert all(one == 200 or isinstance(one, httpx.TransportError) for one in outcomes), outcomes


def test_killed_worker_is_replaced(tmp_path):
    with RunningService(tmp_path / "log") as service:
        (worker,) = service.workers()
        worker.kill()
        wait_until(lambda: service.is_ready() and not worker.is_running(), seconds=600)
        assert service.post("answer", ask("red")).status_code == 200
        assert service.metric("trips_requests_in_progress") == 0
