"""Commands, and replacements of the programs that Pillow starts for some formats."""

import os
import subprocess


EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 64 64\n%%EndComments\nshowpage\n"


def output_of(*command, variables=(), **options):
    """
    Run a command that must succeed, and return what it prints.

    Args:
        variables: of the environment, beside those of this process.
        options: of `subprocess.run`.
    """
    options = {"env": {**os.environ, **dict(variables)}, **options}
    result = subprocess.run(list(map(str, command)), capture_output=True, text=True, **options)
    assert result.returncode == 0, f"{command}\n{result.stdout[-5000:]}\n{result.stderr[-5000:]}"
    return result.stdout


def add_fake_ghostscript(folder, set_variable):
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
