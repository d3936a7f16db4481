"""
Load test of a running service with Locust: throughput and response times of 1, 8 and 32 clients with different images,
and of one client that sends ten questions in ten requests about one image and about ten.

    TRIPS_MODEL=examples/trips-tiny-scenes bentoml serve trips_serving.service:Trips --host 127.0.0.1 --port 3000 &
    python benchmarks/load_service.py --url http://127.0.0.1:3000 --requests 500 --output_json rows.json

With `--pid`, rows include the memory of that process and its children.
"""

import base64
import io
import itertools
import os
import random
import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass, field

import PIL.Image
import PIL.ImageDraw
import psutil
from measuring import OutputArguments, run_benchmark


QUESTIONS = [
    "what shape is in the image?",
    "what color is the shape?",
    "is there a circle?",
    "is there a red shape?",
    "does the image contain a triangle?",
    "is there a blue shape?",
    "is there not a rectangle?",
    "is a green shape present?",
    "what is the color of the shape?",
    "is there a gray shape in the image?",
]


def make_image(number: int, size: list[int]) -> str:
    """Make a different base64 JPEG of a shape and noise for each number."""
    draw = random.Random(number)
    image = PIL.Image.effect_noise(size, 20).convert("RGB")
    left, top = (draw.randrange(length // 2) for length in size)
    color = tuple(draw.randrange(256) for _ in range(3))
    PIL.ImageDraw.Draw(image).rectangle((left, top, left + size[0] // 3, top + size[1] // 3), fill=color)
    file = io.BytesIO()
    image.save(file, "JPEG", quality=90)
    return base64.b64encode(file.getvalue()).decode()


@dataclass(kw_only=True)
class LoadArguments(OutputArguments):
    url: str = field(default="http://127.0.0.1:3000", metadata={"help": "Address of the service."})
    clients: list[int] = field(default_factory=lambda: [1, 8, 32], metadata={"help": "Numbers of clients."})
    requests: int = field(default=500, metadata={"help": "Requests for each number of clients."})
    images: int = field(default=200, metadata={"help": "Different images for each number of clients."})
    size: list[int] = field(default_factory=lambda: [640, 480], metadata={"help": "Width and height of the images."})
    rounds: int = field(default=7, metadata={"help": "Rounds of ten requests about one image and ten. 0: none."})
    pid: int | None = field(default=None, metadata={"help": "Process id of the service, to read its memory."})


def bodies(images: list[str], num_requests: int) -> Iterator[dict]:
    for number in range(num_requests):
        yield {"image": images[number % len(images)], "questions": [QUESTIONS[number % len(QUESTIONS)]]}


def run(url: str, num_clients: int, images: list[str], num_requests: int) -> dict:
    """Send `num_requests` from `num_clients` clients and return a row."""
    # Locust patches sockets at import, so `--help` must not import it.
    import gevent
    from locust import constant, task
    from locust.contrib.fasthttp import FastHttpUser
    from locust.env import Environment

    waiting = bodies(images, num_requests)

    class Asking(FastHttpUser):
        """Client that sends all questions without a pause."""

        wait_time = constant(0)

        @task
        def ask(self):
            body = next(waiting, None)
            if body is None:
                gevent.sleep(0.05)  # until the other clients finish
            else:
                self.client.post("/answer", json=body)

    environment = Environment(user_classes=[Asking], host=url)
    runner = environment.create_local_runner()
    start = time.perf_counter()
    runner.start(num_clients, spawn_rate=num_clients)
    while environment.stats.total.num_requests < num_requests:
        gevent.sleep(0.01)
    seconds = time.perf_counter() - start
    total = environment.stats.total  # starting replaces `total`
    runner.quit()
    return {
        "clients": num_clients,
        "requests": total.num_requests,
        "failures": total.num_failures,
        "requests_per_second": total.num_requests / seconds,
        "mean_ms": total.avg_response_time,
        "p50_ms": total.get_response_time_percentile(0.5),
        "p99_ms": total.get_response_time_percentile(0.99),
    }


def memory_of(pid: int | None) -> int | None:
    """Return the resident memory of a process and its children in bytes."""
    if pid is None:
        return None
    process = psutil.Process(pid)
    return sum(one.memory_info().rss for one in [process, *process.children(recursive=True)])


def compare_images(url: str, size: list[int], rounds: int) -> dict:
    """Return the median seconds of ten questions in ten requests, about one new image and about ten, in turns."""
    seconds: dict[int, list[float]] = {1: [], 10: []}
    numbers = itertools.count(10**6)
    for _ in range(rounds):
        for num_images, found in seconds.items():
            images = [make_image(next(numbers), size) for _ in range(num_images)]
            found.append(10 * run(url, 1, images, 10)["mean_ms"] / 1000)
    one, ten = map(statistics.median, seconds.values())
    return {"one_image_seconds": one, "ten_images_seconds": ten, "ratio": ten / one}


def measure(args: LoadArguments) -> Iterator[dict]:
    run(args.url, 8, [make_image(-number, args.size) for number in range(1, 21)], 40)  # warm up
    shared = {"cores": os.cpu_count(), "options": args.settings("pid")}
    for position, num_clients in enumerate(args.clients):
        # New images for each row, because earlier ones may be cached.
        numbers = range(position * args.images, (position + 1) * args.images)
        images = [make_image(number, args.size) for number in numbers]
        row = run(args.url, num_clients, images, args.requests)
        yield {**row, "memory": memory_of(args.pid), "load_average": os.getloadavg()[0], **shared}
    if args.rounds:
        yield {**compare_images(args.url, args.size, args.rounds), "load_average": os.getloadavg()[0], **shared}


def print_rows(rows: list[dict], args: LoadArguments):
    for row in rows:
        numbers = {name: value for name, value in row.items() if isinstance(value, (int, float))}
        print(" ".join(f"{name}={value:.4g}" for name, value in numbers.items()))


def main(argv: list[str] | None = None) -> list[dict]:
    return run_benchmark(LoadArguments, __doc__, measure, print_rows, argv)


if __name__ == "__main__":
    main()
