"""Run the service. All settings but the model and the address are environment variables."""

import argparse
import multiprocessing
import os
import socket
import sys
import tempfile
from pathlib import Path

from granian import Granian
from granian.constants import HTTPModes, Interfaces
from granian.http import HTTP1Settings
from granian.log import LogLevels

from .settings import FAILURE, Settings


def main(argv: list[str] | None = None):
    parser = argparse.ArgumentParser("python -m trips_serving", description=__doc__)
    parser.add_argument("--model", help="Checkpoint or exported model: folder or Hub name. Default: TRIPS_MODEL.")
    parser.add_argument("--host", default="127.0.0.1", help="Address to listen on. Default: 127.0.0.1.")
    parser.add_argument("--port", type=int, default=3000, help="Port to listen on. Default: 3000.")
    args = parser.parse_args(argv)
    if args.model:
        os.environ["TRIPS_MODEL"] = args.model
    try:
        settings = Settings.from_environment()
        if Path(settings.model).is_dir():  # or else, if it is deleted, a new worker would ask the Hub for this name
            os.environ["TRIPS_MODEL"] = os.path.abspath(settings.model)
        socket.create_server((args.host, args.port)).close()  # the workers would share a port that is in use
    except (OSError, ValueError) as error:
        sys.exit(f"The service cannot start on {args.host}:{args.port}: {error}")
    # The tracker of a worker that ends while it loads would write after the reason.
    os.environ.setdefault("PYTHONWARNINGS", "ignore::UserWarning:multiprocessing.resource_tracker")
    multiprocessing.set_start_method("spawn")  # a fork would ignore SIGTERM while it loads the model
    server = Granian(
        "trips_serving.service:create_app",
        factory=True,
        address=args.host,
        port=args.port,
        interface=Interfaces.ASGI,
        http=HTTPModes.http1,
        http1_settings=HTTP1Settings(header_read_timeout=3000),  # ms, also between requests
        websockets=False,
        workers=settings.workers,
        backpressure=512,  # connections of a worker; a process may usually open 1,024 files
        respawn_failed_workers=True,
        workers_kill_timeout=int(settings.read_timeout + settings.max_latency_ms / 1000) + 10,
        log_level=LogLevels.warning,
    )
    print(f"Loading {settings.model} to serve it at http://{args.host}:{args.port}", flush=True)
    with tempfile.TemporaryDirectory(prefix="trips-metrics-") as folder:
        os.environ["PROMETHEUS_MULTIPROC_DIR"] = folder  # workers write their metrics there
        failure = Path(folder) / FAILURE
        try:
            server.serve()
        finally:
            if failure.exists():
                sys.exit(failure.read_text())


if __name__ == "__main__":
    main()
