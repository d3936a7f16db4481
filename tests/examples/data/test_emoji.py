"""The emoji of a font as named images."""

import matplotlib
import pytest

from trips_examples.data.emoji import character_names, write_emoji


NAMES = """<ldml><annotations>
<annotation cp="A">a | letter</annotation><annotation cp="A" type="tts">capital letter</annotation>
<annotation cp="B" type="tts">2</annotation></annotations></ldml>"""


@pytest.fixture
def annotations(tmp_path):
    (tmp_path / "en.xml").write_text(NAMES)
    return tmp_path / "en.xml"


def test_characters_have_the_short_names_of_cldr(annotations):
    assert character_names(annotations) == {"A": "capital letter"}


def test_a_font_without_pictures_is_refused(annotations, tmp_path):
    font = f"{matplotlib.get_data_path()}/fonts/ttf/DejaVuSans.ttf"
    with pytest.raises(ValueError, match="DejaVuSans.ttf"):
        write_emoji(font, annotations, tmp_path / "emoji")
    assert not (tmp_path / "emoji").exists()
