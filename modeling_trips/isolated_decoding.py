# Copyright 2026 The TRIPS for Transformers authors.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
"""Decode untrusted image files in processes that can be killed, for the service and the app."""

import queue
import signal
import struct
import subprocess
import sys
import threading
from pathlib import Path

from PIL import Image

from .image_decoding_trips import MAX_PIXELS, ImageError, decode_image


# The package is replaced by one without `__init__`, so that the processes start without PyTorch.
_PROGRAM = """
import sys
from types import ModuleType
package = sys.modules["modeling_trips"] = ModuleType("modeling_trips")
package.__path__ = sys.argv[1:]
from modeling_trips.isolated_decoding import serve
serve()
"""
_REQUEST = struct.Struct(">QQ")  # bytes of the file, largest number of pixels
_REPLY = struct.Struct(">IIQ")  # width and height, or zeros for an error; bytes that follow


class IsolatedDecoder:
    """
    Decoder of image files in separate processes, which are killed if they take too long. It is thread-safe.

    The processes start with the first images and end with this process.

    Args:
        num_processes (`int`, *optional*, defaults to 2): Number of files that are decoded at a time; other calls wait.
        seconds (`float`, *optional*, defaults to 5.0): Time limit for one file.
    """

    def __init__(self, num_processes: int = 2, seconds: float = 5.0):
        self.seconds = seconds
        self._processes: queue.LifoQueue[subprocess.Popen | None] = queue.LifoQueue()
        for _ in range(num_processes):
            self._processes.put(None)

    def decode(self, data: bytes, max_pixels: int = MAX_PIXELS) -> Image.Image:
        """
        Decode an image file as [`decode_image`] does.

        Raises:
            [`ImageError`]: As there; also with the reason `"work"` if decoding exceeds `seconds` or ends the process.
        """
        process = self._processes.get()
        try:
            if process is None or process.poll() is not None:
                process = _start_process()
            timer = threading.Timer(self.seconds, process.kill)
            timer.start()
            try:
                return _request(process, data, max_pixels)
            except (EOFError, OSError) as error:
                process.kill()
                process.wait()
                raise ImageError(
                    "work", "The image takes too long to decode. Save it again as a plain PNG."
                ) from error
            finally:
                timer.cancel()
        finally:
            self._processes.put(process)

    def close(self):
        """End the processes. Later calls start new ones."""
        for _ in range(self._processes.qsize()):
            process = self._processes.get()
            if process is not None:
                process.communicate()
            self._processes.put(None)


def _start_process() -> subprocess.Popen:
    # A supervisor sends SIGTERM to all processes of a service while requests are in flight. The process inherits the
    # mask and ends when its standard input closes.
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    try:
        # -I: the environment and the folder of this file do not affect imports.
        return subprocess.Popen(
            [sys.executable, "-I", "-c", _PROGRAM, str(Path(__file__).parent)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            pipesize=1 << 20,  # bytes, for fewer switches between the processes
            start_new_session=True,
        )
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)


def _request(process: subprocess.Popen, data: bytes, max_pixels: int) -> Image.Image:
    process.stdin.write(_REQUEST.pack(len(data), max_pixels))
    process.stdin.write(data)
    process.stdin.flush()
    width, height, num_bytes = _REPLY.unpack(_read(process.stdout, _REPLY.size))
    content = _read(process.stdout, num_bytes)
    if width == 0:
        reason, _, message = content.decode("utf-8").partition("\n")
        raise ImageError(reason, message)
    return Image.frombytes("RGB", (width, height), content)


def _read(stream, num_bytes: int) -> bytes:
    content = stream.read(num_bytes)
    if len(content) < num_bytes:
        raise EOFError("the other process has ended")
    return content


def serve():
    """Decode the files from standard input until it closes."""
    source = sys.stdin.buffer
    while True:
        try:
            num_bytes, max_pixels = _REQUEST.unpack(_read(source, _REQUEST.size))
            _reply(_read(source, num_bytes), max_pixels, sys.stdout.buffer)
        except EOFError:
            return


def _reply(data: bytes, max_pixels: int, target):
    """Decode a file and write the reply. Its own scope frees the image while the process waits."""
    try:
        image = decode_image(data, max_pixels)
        (width, height), content = image.size, image.tobytes()
    except ImageError as error:
        width, height, content = 0, 0, f"{error.reason}\n{error}".encode("utf-8", "backslashreplace")
    target.write(_REPLY.pack(width, height, len(content)))
    target.write(content)
    target.flush()
