"""The service in a separate process on loopback, with a client."""

import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import httpx
import psutil
from places import EXAMPLES


CHECKPOINT = EXAMPLES / "trips-tiny-scenes"


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def wait_until(is_so, seconds=300):
    end = time.monotonic() + seconds
    while not is_so():
        assert time.monotonic() < end
        time.sleep(0.05)


class RunningService:
    """
    Context that runs `python -m trips_serving`.

    Args:
        log (`Path`): file for its output.
        settings: as in `queue=4`, which is `TRIPS_QUEUE=4` to the process.
    """

    def __init__(self, log, model=CHECKPOINT, **settings):
        self.log = log
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.python = Path(sys.executable)
        self.folder: Path | None = None  # where it starts; by default here
        self.environment = {
            f"TRIPS_{name.upper()}": str(value) for name, value in {"model": model, **settings}.items()
        }

    def __enter__(self):
        self.start()
        until = time.monotonic() + 600
        while not self.is_ready():
            assert self.process.poll() is None and time.monotonic() < until, self.log.read_text()[-3000:]
            time.sleep(0.2)
        return self

    def start(self):
        command = [str(self.python), "-m", "trips_serving", "--port", str(self.port)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", **self.environment}
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                command, stdout=log, stderr=subprocess.STDOUT, env=environment, cwd=self.folder
            )

    def __exit__(self, *error):
        self.process.terminate()
        self.process.wait(300)

    def is_ready(self):
        try:
            return httpx.get(f"{self.url}/readyz").status_code == 200
        except httpx.TransportError:
            return False

    def workers(self):
        children = psutil.Process(self.process.pid).children()
        return [child for child in children if "spawn_main" in " ".join(child.cmdline())]

    def get(self, path):
        return httpx.get(f"{self.url}/{path}", timeout=600)

    def post(self, endpoint, body=None, **options):
        options = options if body is None else {"json": body, **options}
        return httpx.post(f"{self.url}/{endpoint}", timeout=600, **options)

    def metric(self, name):
        """Return the sum of a metric over its labels."""
        lines = httpx.get(f"{self.url}/metrics").text.splitlines()
        return sum(float(line.rpartition(" ")[2]) for line in lines if line.startswith((f"{name} ", name + "{")))
