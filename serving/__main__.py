"""Run the service. All settings but the address are environment variables."""

import argparse
import os
import socket
import sys
import tempfile

import uvicorn
from uvicorn.config import STARTUP_FAILURE
from uvicorn.supervisors import Multiprocess

from .settings import Settings


class Supervisor(Multiprocess):
    """
    It does not import PyTorch. It replaces a worker that dies, and stops if one cannot start. It sees that at once,
    since the worker alone holds its end of the pipe.
    """

    def keep_subprocess_alive(self):
        for process in self.processes:
            process.child_conn.close()
        super().keep_subprocess_alive()


def main(argv: list[str] | None = None):
    parser = argparse.ArgumentParser("python -m trips_serving", description=__doc__)
    parser.add_argument("--host", default="127.0.0.1", help="Address to listen on. Default: 127.0.0.1.")
    parser.add_argument("--port", type=int, default=3000, help="Port to listen on. Default: 3000.")
    args = parser.parse_args(argv)
    try:
        settings = Settings.from_environment()
    except ValueError as error:
        sys.exit(str(error))
    config = uvicorn.Config(
        "trips_serving.service:create_app",
        factory=True,
        host=args.host,
        port=args.port,
        workers=settings.workers,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        timeout_graceful_shutdown=int(settings.read_timeout + settings.max_latency_ms / 1000) + 10,
        timeout_worker_healthcheck=60,  # a worker answers late while it loads the model
    )
    with tempfile.TemporaryDirectory(prefix="trips-metrics-") as folder:
        os.environ["PROMETHEUS_MULTIPROC_DIR"] = folder  # workers write their metrics there
        listener = config.bind_socket()
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)  # or clients delay their ACK of the headers
        supervisor = Supervisor(config, sockets=[listener])
        supervisor.run()
    if any(process.exitcode == STARTUP_FAILURE for process in supervisor.processes):
        sys.exit(1)


if __name__ == "__main__":
    main()
