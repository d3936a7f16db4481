"""Scripts that run one after another in one real process: the imports, which take seconds, are made once."""

import contextlib
import faulthandler
import io
import json
import os
import runpy
import subprocess
import sys
from dataclasses import dataclass


@dataclass
class Ended:
    """Exit code of a script, what it printed, and its message at the end, "" without one."""

    code: int
    printed: str
    message: str = ""


def run_scripts(commands: list[list[str]], seconds: int = 120, **environment: str) -> list[Ended]:
    """
    Run scripts of the examples, each with its name and options, as `python -m trips_examples.NAME OPTIONS`. An
    exception that is not caught, or a script that does not end in `seconds`, fails with its traceback.
    """
    process = subprocess.run(
        [sys.executable, __file__, json.dumps(commands), str(seconds)],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        errors="surrogateescape",
        timeout=seconds * len(commands) + 60,
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
    for command in json.loads(all_commands):
        faulthandler.dump_traceback_later(int(limit), exit=True)
        print(json.dumps(vars(_run(*command))), flush=True)
