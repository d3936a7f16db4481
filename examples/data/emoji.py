"""The emoji of a font as a list of named images."""

import json
import xml.etree.ElementTree as ElementTree
from pathlib import Path

from modeling_trips.conversion.files import whole_folder
from trips_examples.data.pictures import clean_name


def emoji_pictures(font_file: str | Path) -> dict[str, bytes]:
    """Return the PNG image of each character that has one."""
    from fontTools.ttLib import TTFont

    font = TTFont(font_file)
    if "CBDT" not in font:
        raise ValueError(f"{font_file} has no images (table CBDT). Give a color font such as Noto Color Emoji.")
    glyphs = font["CBDT"].strikeData[0]
    return {chr(code): glyphs[glyph].imageData for code, glyph in font.getBestCmap().items() if glyph in glyphs}


def character_names(annotations_file: str | Path) -> dict[str, str]:
    """Return CLDR's short name of each character, without characters whose name `clean_name` rejects."""
    nodes = ElementTree.parse(annotations_file).iterfind(".//annotation[@type='tts']")
    names = {node.get("cp"): clean_name(node.text) for node in nodes}
    return {character: name for character, name in names.items() if name}


def write_emoji(font_file: str | Path, annotations_file: str | Path, folder: str | Path) -> int:
    """
    Write a folder of PNG files and `pictures.jsonl`, their list.

    Args:
        font_file (`str`): a color font such as Noto Color Emoji.
        annotations_file (`str`): CLDR's names of characters in a language, such as "owl" and "fire engine".
        folder (`str`): must not exist yet.

    Returns:
        `int`: Number of images: single characters with an image and a name.

    Raises:
        `ValueError`: The font has no images.
    """
    pictures, names = emoji_pictures(font_file), character_names(annotations_file)
    rows = []
    with whole_folder(folder) as partial:
        partial.mkdir()
        for character in sorted(pictures.keys() & names.keys()):
            file = partial / f"{ord(character):x}.png"
            file.write_bytes(pictures[character])
            rows.append({"image": file.name, "name": names[character]})
        lines = [json.dumps(row, ensure_ascii=False) for row in rows]
        (partial / "pictures.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return len(rows)
