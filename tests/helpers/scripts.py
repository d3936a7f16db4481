"""Scripts that run one after another in one real process: the imports, which take seconds, are made once."""

import contextlib
import faulthandler
import io
import json
import os
import resource
import runpy
import signal
import subprocess
import sys
import time
from dataclasses import dataclass


@dataclass
class Ended:
    """Exit code of a script, what it printed, and its message at the end, "" without one."""

    code: int
    printed: str
    message: str = ""


def run_scripts(commands: list[list[str]], seconds: int = 60, **environment: str) -> list[Ended]:
    """
    Run scripts of the examples, each with its name and options, as `python -m trips_examples.NAME OPTIONS`. An
    exception that is not caught, or a script that takes more than `seconds` of a processor, fails with its traceback.
    """
    process = subprocess.run(
        [sys.executable, __file__, json.dumps(commands), str(seconds)],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        errors="surrogateescape",
        timeout=1800,
    )
    assert process.returncode == 0, process.stderr[-5000:]
    return [Ended(**json.loads(line)) for line in process.stdout.splitlines()]


def _run(name: str, *options: str) -> Ended:
    sys.argv = [name, *options]
    printed = io.StringIO()
    code: str | int | None = 0
    with contextlib.redirect_stdout(printed):
        try:
            runpy.run_module(f"trips_examples.{name}", run_name="__main__", alter_sys=True)
        except SystemExit as end:
            code = end.code
    if isinstance(code, str):  # of `sys.exit`, which prints it
        return Ended(1, printed.getvalue(), code)
    return Ended(code or 0, printed.getvalue())


if __name__ == "__main__":
    _, all_commands, limit = sys.argv
    faulthandler.register(signal.SIGXCPU, chain=True)
    for command in json.loads(all_commands):
        limit_of_process = int(time.process_time()) + int(limit)
        resource.setrlimit(resource.RLIMIT_CPU, (limit_of_process, resource.RLIM_INFINITY))
        print(json.dumps(vars(_run(*command))), flush=True)
