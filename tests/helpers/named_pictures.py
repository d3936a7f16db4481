"""A toy list of named images: plain shapes with a transparent border."""

import json
from pathlib import Path

import PIL.Image


NAMES = [f"{color} {size}" for color in ("red", "blue", "green", "white", "black", "gray") for size in ("bar", "card")]
SIZES = {"bar": (40, 10), "card": (24, 30)}


def write_pictures(folder: Path) -> Path:
    """Write an image of each of `NAMES`, and return their list."""
    rows = []
    for name in NAMES:
        color, shape = name.split()
        picture = PIL.Image.new("RGBA", (60, 60))
        picture.paste(color, (5, 7, 5 + SIZES[shape][0], 7 + SIZES[shape][1]))
        picture.save(folder / f"{color}_{shape}.png")
        rows.append({"image": f"{color}_{shape}.png", "name": f"a {color} {shape}"})
    file = folder / "pictures.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)) + "\n")
    return file
