"""A shared service with low limits."""

import pytest


pytest.importorskip("granian")

from running_service import RunningService  # noqa: E402


@pytest.fixture(scope="session")
def service(tmp_path_factory):
    log = tmp_path_factory.mktemp("service") / "log.txt"
    settings = {
        "max_batch_size": 3,
        "max_body_bytes": 300_000,
        "max_pixels": 1_000_000,
        "max_texts": 4,
        "read_timeout": 2,
        "schedule": "2:text:0.25",
    }
    with RunningService(log, **settings) as running:
        yield running
        assert running.process.poll() is None
