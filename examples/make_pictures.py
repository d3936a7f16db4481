"""
Make a list of named pictures of the emoji in a font: a folder of PNG files and `pictures.jsonl`, for
`--dataset_name picture_scenes --pictures FOLDER/pictures.jsonl`.

    apt-get install fonts-noto-color-emoji unicode-cldr-core  # on Debian and Ubuntu: Noto's emoji, CLDR's names
    python examples/make_pictures.py --output_dir pictures/emoji

Names are CLDR's short names of single characters ("owl", "fire engine"), in any language that CLDR has. Drawings come
without a command: `apt-get install openclipart-png`, and `--pictures /usr/share/openclipart/png`.
"""

import trips_examples  # noqa: F401  # isort: skip

import json
import xml.etree.ElementTree as ElementTree
from dataclasses import dataclass, field
from pathlib import Path

from modeling_trips.conversion.files import whole_folder
from trips_examples.data.pictures import clean_name
from trips_examples.training.parser import make_parser


DEBIAN_PACKAGES = "fonts-noto-color-emoji and unicode-cldr-core"


@dataclass
class PictureArguments:
    output_dir: str = field(metadata={"help": "Folder to write. It must not exist yet."})
    font: str = field(
        default="/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf",
        metadata={"help": "A font with PNG pictures of emoji (a table CBDT)."},
    )
    annotations: str = field(
        default="/usr/share/unicode/cldr/common/annotations/en.xml", metadata={"help": "CLDR's names of characters."}
    )

    def __post_init__(self):
        for file in (self.font, self.annotations):
            if not Path(file).is_file():
                raise FileNotFoundError(f"There is no file {file}: install {DEBIAN_PACKAGES}, or name another.")
        if Path(self.output_dir).exists():
            raise FileExistsError(f"--output_dir {self.output_dir} exists. Choose another one, or remove it first.")


def emoji_pictures(font_file: str) -> dict[str, bytes]:
    """The PNG picture of each character that has one."""
    from fontTools.ttLib import TTFont

    font = TTFont(font_file)
    if "CBDT" not in font:
        raise ValueError(f"{font_file} has no pictures (no table CBDT): give a colour font such as Noto Color Emoji.")
    glyphs = font["CBDT"].strikeData[0]
    return {chr(code): glyphs[glyph].imageData for code, glyph in font.getBestCmap().items() if glyph in glyphs}


def character_names(annotations_file: str) -> dict[str, str]:
    """CLDR's short name of each character; those that the rule of names leaves nothing of are left out."""
    nodes = ElementTree.parse(annotations_file).iterfind(".//annotation[@type='tts']")
    names = {node.get("cp"): clean_name(node.text) for node in nodes}
    return {character: name for character, name in names.items() if name}


def main(argv: list[str] | None = None):
    (args,) = make_parser(PictureArguments, description=__doc__).parse_args_into_dataclasses(args=argv)
    pictures, names = emoji_pictures(args.font), character_names(args.annotations)
    rows = []
    with whole_folder(args.output_dir) as folder:
        folder.mkdir()
        for character in sorted(pictures.keys() & names.keys()):
            file = folder / f"{ord(character):x}.png"
            file.write_bytes(pictures[character])
            rows.append({"image": file.name, "name": names[character]})
        lines = [json.dumps(row, ensure_ascii=False) for row in rows]
        (folder / "pictures.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    print(f"{len(rows)} named pictures: --dataset_name picture_scenes --pictures {args.output_dir}/pictures.jsonl")


if __name__ == "__main__":
    main()
