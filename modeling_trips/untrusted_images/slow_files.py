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
"""
Find image files that take much longer to decode than their size suggests.

This file does not import siblings, so that `handler.py` can load it from a repository on the Hub.
"""

import re


MAX_JPEG_SCANS = 100  # encoders write about 10; each further scan costs a pass over the whole image
MAX_GIF_COMMENT_BYTES = 1 << 16  # Pillow joins the parts of a comment in quadratic time


def why_slow(data: bytes) -> str | None:
    """
    Return why an image file is slow to decode and what to do, or None.

    Slow are JPEGs with more than 100 scans, GIFs with comments above 64 KiB, and BMPs with run-length encoding.
    """
    if data.startswith(b"\xff\xd8") and _has_too_many_scans(data):
        return f"The JPEG has more than {MAX_JPEG_SCANS} scans. Save it again as a plain JPEG."
    if data.startswith((b"GIF87a", b"GIF89a")) and _gif_comment_bytes(data) > MAX_GIF_COMMENT_BYTES:
        return f"The GIF has comments of more than {MAX_GIF_COMMENT_BYTES:,} bytes. Remove them."
    # Bytes 30 to 33 of a BMP are its compression. 1 and 2 are run-length encodings, which Pillow decodes in Python.
    if data.startswith(b"BM") and data[30:34] in (b"\1\0\0\0", b"\2\0\0\0"):
        return "The BMP is run-length encoded. Save it without compression, or as a PNG."
    return None


_JPEG_MARKER = re.compile(rb"\xff+([\x01-\xcf\xd8-\xfe])", re.DOTALL)  # not stuffing (00) and restarts (d0 to d7)


def _has_too_many_scans(data: bytes) -> bool:
    num_scans = 0
    position = 2
    while (found := _JPEG_MARKER.search(data, position)) is not None:
        marker = found[1]
        position = found.end()
        if marker == b"\xd9":  # end of the image
            break
        if marker not in (b"\x01", b"\xd8"):  # these have no segment
            position += int.from_bytes(data[position : position + 2], "big")
        num_scans += marker == b"\xda"
        if num_scans > MAX_JPEG_SCANS:
            return True
    return False


def _gif_comment_bytes(data: bytes) -> int:
    """Return the number of bytes in the comments before the first frame."""
    total = 0
    position = 13 + _color_table_bytes(data[10:11])
    while data[position : position + 1] == b"!":  # an extension
        is_comment = data[position + 1 : position + 2] == b"\xfe"
        position += 2
        while size := int.from_bytes(data[position : position + 1], "big"):
            total += size if is_comment else 0
            position += 1 + size
        position += 1
    return total


def _color_table_bytes(flags: bytes) -> int:
    value = int.from_bytes(flags, "big")
    return 3 << (value % 8 + 1) if value & 0x80 else 0
