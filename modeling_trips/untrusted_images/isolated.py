"""Decode image files in processes that can be killed."""

import os
import queue
import signal
import struct
import subprocess
import sys
import threading
from contextlib import suppress
from pathlib import Path

from PIL import Image

from ..image_decoding_trips import MAX_PIXELS, ImageError, decode_image
from .slow_files import why_slow


# The package is replaced by one without `__init__`, so that the processes start without PyTorch.
_PROGRAM = """
import sys
from types import ModuleType
package = sys.modules["modeling_trips"] = ModuleType("modeling_trips")
package.__path__ = sys.argv[1:]
from modeling_trips.untrusted_images.isolated import serve
serve()
"""
_REQUEST = struct.Struct(">QQ")  # bytes of the file, largest number of pixels
_REPLY = struct.Struct(">IIQ")  # width and height, or zeros for an error; bytes that follow


def decode_untrusted(data: bytes, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """
    Decode an image file in this process, as [`decode_image`] does, unless its structure makes it slow to decode.

    Raises:
        [`ImageError`]: As `decode_image`; with the reason `"work"` for JPEGs with more than 100 scans, GIFs with
            comments above 64 KiB, and BMPs with run-length encoding.
    """
    if message := why_slow(data):
        raise ImageError("work", message)
    return decode_image(data, max_pixels)


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
        self._workers: queue.LifoQueue[_Worker | None] = queue.LifoQueue()
        for _ in range(num_processes):
            self._workers.put(None)

    def decode(self, data: bytes, max_pixels: int = MAX_PIXELS) -> Image.Image:
        """
        Decode an image file as [`decode_untrusted`] does.

        If the process was stopped or ends for another reason than the time limit, a new process tries once more. An
        exception in this process, such as `KeyboardInterrupt`, ends the other one, so that no later call gets the rest
        of its reply.

        Raises:
            [`ImageError`]: As there; also with the reason `"work"` if decoding exceeds `seconds` or ends the process.
        """
        worker = self._workers.get()
        try:
            for is_last in (False, True):
                if worker is None or not worker.is_usable or worker.process.poll() is not None:
                    worker = _Worker()
                try:
                    width, height, content = worker.ask(data, max_pixels, self.seconds)
                    break
                except (EOFError, OSError) as error:
                    if is_last or worker.is_too_slow:
                        message = "The image takes too long to decode. Save it again as a plain PNG."
                        raise ImageError("work", message) from error
        finally:
            self._workers.put(worker)
        if width == 0:
            reason, _, message = content.decode("utf-8").partition("\n")
            raise ImageError(reason, message)
        return Image.frombytes("RGB", (width, height), content)

    def close(self):
        """End the processes. Later calls start new ones."""
        for _ in range(self._workers.qsize()):
            worker = self._workers.get()
            if worker is not None:
                worker.end()
            self._workers.put(None)


class _Worker:
    """Process that decodes one file at a time."""

    def __init__(self):
        self.process = _start_process()
        self.is_usable = True  # no request is open
        self.is_too_slow = False

    def ask(self, data: bytes, max_pixels: int, seconds: float) -> tuple[int, int, bytes]:
        """
        Return width, height and pixels of an image file, or zeros and the error.

        Raises:
            EOFError, OSError: The process has ended, or was ended after `seconds`. Then `is_too_slow` is True, unless
                the process was stopped.
        """
        self.is_usable = False
        timer = threading.Timer(seconds, self._expire)
        try:
            timer.start()
            self.process.stdin.write(_REQUEST.pack(len(data), max_pixels))
            self.process.stdin.write(data)
            self.process.stdin.flush()
            width, height, num_bytes = _REPLY.unpack(_read(self.process.stdout, _REPLY.size))
            content = _read(self.process.stdout, num_bytes)
            self.is_usable = True
            return width, height, content
        finally:
            timer.cancel()
            if not self.is_usable:
                self.end()

    def _expire(self):
        self.is_too_slow = True
        # WNOWAIT leaves the state of the process to `wait`. Not every system has `waitid`.
        with suppress(AttributeError, ChildProcessError):
            self.is_too_slow = os.waitid(os.P_PID, self.process.pid, os.WSTOPPED | os.WNOHANG | os.WNOWAIT) is None
        self.process.kill()

    def end(self):
        self.process.kill()
        self.process.wait()


def _start_process() -> subprocess.Popen:
    # A supervisor sends SIGTERM to all processes of a service while requests are in flight. The process inherits the
    # mask and ends when its standard input closes.
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    try:
        # -I: the environment and the folder of this file do not affect imports.
        return subprocess.Popen(
            [sys.executable, "-I", "-c", _PROGRAM, str(Path(__file__).parents[1])],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            pipesize=1 << 20,  # bytes, for fewer switches between the processes
            start_new_session=True,
        )
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)


def _read(stream, num_bytes: int) -> bytes:
    content = stream.read(num_bytes)
    if len(content) < num_bytes:
        raise EOFError("the other process has ended")
    return content


def serve():
    """Decode the files from standard input until it closes."""
    source = sys.stdin.buffer
    target = sys.stdout.buffer
    while True:
        try:
            num_bytes, max_pixels = _REQUEST.unpack(_read(source, _REQUEST.size))
            data = _read(source, num_bytes)
        except EOFError:
            return
        _reply(data, max_pixels, target)
        del data


def _reply(data: bytes, max_pixels: int, target):
    """Decode a file and write the reply. Its own scope frees the image while the process waits."""
    try:
        image = decode_untrusted(data, max_pixels)
        width, height = image.size
        content = image.tobytes()
    except ImageError as error:
        width = 0
        height = 0
        content = f"{error.reason}\n{error}".encode("utf-8", "backslashreplace")
    target.write(_REPLY.pack(width, height, len(content)))
    target.write(content)
    target.flush()
