"""Images of noise, and valid and malicious image files."""

import io
import struct
import zlib

import numpy as np
from PIL import Image


def noise(width, height, seed=0):
    """Return an image of random colors."""
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def encoded(image, kind="PNG", **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def bomb(width, height):
    """Return a PNG of a few hundred bytes that claims this size."""

    def chunk(name, data):
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    pixels = zlib.compress(b"\0" * 100_000)
    chunks = [chunk(b"IHDR", header), chunk(b"IDAT", pixels), chunk(b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


def scan_bomb(side, num_scans):
    """Return a progressive JPEG with `num_scans` refinements of a few bytes; each needs a pass over all blocks."""
    source = encoded(Image.new("L", (side, side), 128), "JPEG", progressive=True, quality=50)
    tables = b""
    position = 2
    while (marker := source[position + 1]) != 0xDA:
        length = 2 + int.from_bytes(source[position + 2 : position + 4], "big")
        if marker in (0xDB, 0xC2):
            tables += source[position : position + length]
        position += length

    def huffman_table(kind, value):
        num_codes = bytes([1] + [0] * 15)  # by length: one code of one bit
        return b"\xff\xc4" + struct.pack(">HB", 20, kind << 4) + num_codes + bytes([value])

    def scan(start, end, low):
        return b"\xff\xda" + struct.pack(">HBBBBBB", 8, 1, 1, 0, start, end, low)

    num_blocks = ((side + 7) // 8) ** 2
    bits = ("0" + "1" * 14) * -(-num_blocks // 32767)
    bits += "1" * (-len(bits) % 8)
    runs = int(bits, 2).to_bytes(len(bits) // 8, "big").replace(b"\xff", b"\xff\0")
    first = scan(0, 0, 1) + b"\0" * ((num_blocks + 7) // 8)
    refinement = scan(1, 63, 1) + runs
    tables += huffman_table(0, 0) + huffman_table(1, 0xE0)
    return b"\xff\xd8" + tables + first + refinement * num_scans + b"\xff\xd9"


def gif_with_comment(num_bytes):
    gif = encoded(Image.new("P", (20, 20)), "GIF")
    num_colors = 2 ** (gif[10] % 8 + 1)
    frame = gif.index(b",", 13 + 3 * num_colors)
    block = bytes([255]) + b"c" * 255
    comment = b"!\xfe" + block * (num_bytes // 255) + b"\0"
    return gif[:frame] + comment + gif[frame:]


def run_length_bmp():
    info = struct.pack("<IiiHHIIiiII", 40, 20, 20, 1, 8, 1, 42, 2835, 2835, 2, 2)
    palette = bytes([0, 0, 0, 0, 255, 255, 255, 0])
    row = b"\x14\x01\0\0"  # 20 times color 1, end of the row
    pixels = row * 20 + b"\0\x01"
    offset = 14 + len(info) + len(palette)
    header = struct.pack("<IHHI", offset + len(pixels), 0, 0, offset)
    return b"BM" + header + info + palette + pixels


def jpeg_with(image, marker, content):
    jpeg = encoded(image, "JPEG")
    return jpeg[:2] + marker + struct.pack(">H", 2 + len(content)) + content + jpeg[2:]


def animated_webp(canvas, frame):
    """Return a WebP whose canvas (VP8X) is larger than its frame."""

    def chunk(name, data):
        return name + struct.pack("<I", len(data)) + data + b"\0" * (len(data) % 2)

    def size(width, height):
        return (width - 1).to_bytes(3, "little") + (height - 1).to_bytes(3, "little")

    pixels = encoded(Image.new("RGB", frame), "WEBP", lossless=True)[12:]
    chunks = [
        chunk(b"VP8X", b"\2\0\0\0" + size(*canvas)),
        chunk(b"ANIM", b"\0" * 6),
        chunk(b"ANMF", b"\0" * 6 + size(*frame) + b"\1\0\0\0" + pixels),
    ]
    content = b"WEBP" + b"".join(chunks)
    return b"RIFF" + struct.pack("<I", len(content)) + content
