"""Commands that are killed while they run, with the processes that they started."""

import os
import subprocess
import time

import psutil


def kill_when(is_time, command):
    """Start a command, and kill it as soon as `is_time()`. It may have ended by then."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    until = time.monotonic() + 1800
    try:
        while not is_time():
            assert process.poll() is None and time.monotonic() < until, f"exit code {process.poll()}"
            time.sleep(0.002)
    finally:
        family = [process]
        if process.poll() is None:  # torchrun starts its processes in separate sessions, so that they survive it
            family += psutil.Process(process.pid).children(recursive=True)
        for member in family:
            member.kill()
            member.wait()
