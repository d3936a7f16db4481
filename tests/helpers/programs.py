"""Replacements of the programs that Pillow starts for some formats."""

import os
from collections.abc import Callable
from pathlib import Path


EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 64 64\n%%EndComments\nshowpage\n"


def add_fake_ghostscript(folder: Path, set_variable: Callable[[str, str], None]) -> tuple[Path, Path]:
    """
    Put a `gs` into the `PATH` that writes a file when it is started.

    Returns:
        The path of an EPS image, whose name ends with `.png`, and that of the file.
    """
    programs, started, image = folder / "programs", folder / "gs_was_started", folder / "eps.png"
    programs.mkdir()
    (programs / "gs").write_text(f"#!/bin/sh\ntouch {started}\nexit 1\n")
    (programs / "gs").chmod(0o755)
    set_variable("PATH", f"{programs}{os.pathsep}{os.environ['PATH']}")
    image.write_bytes(EPS)
    return image, started
