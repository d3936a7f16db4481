"""Texts of strangers in files and on a terminal."""

LONGEST = 500  # characters of a value that an error names


def printable(text: str) -> str:
    """Return a text with lone surrogates, which cannot be encoded, escaped as `\\ud800`."""
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def visible(text: str) -> str:
    """Return a text in one line for a terminal, with control characters and others that are not seen escaped."""
    return "".join(each if each.isprintable() else each.encode("unicode_escape").decode() for each in text)


def shortened(text: str) -> str:
    """Return a text of at most `LONGEST` characters, without the middle of a longer one."""
    if len(text) <= LONGEST:
        return text
    half = LONGEST // 2
    return f"{text[:half]}...{text[-half:]}"
