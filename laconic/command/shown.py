"""Text from outside (names, paths, messages of other programs) as a person may be shown it: one line, nothing hidden,
not too much of it.
"""

import re
import unicodedata

LIMIT = 500  # characters of a message; what is left out is counted
_BREAKS = re.compile(r"\s*[\n\r\v\f\x1c-\x1e\x85\u2028\u2029]\s*")
_JOINERS = "\u200c\u200d"  # written within words of several scripts, and within emoji; they change no order
_UNSEEN = (
    "Cc",
    "Cf",
    "Cs",
    "Co",
    "Cn",
)  # control, format (bidirectional marks among them), lone surrogates, private and unassigned


def shown(text: object, limit: int = LIMIT) -> str:
    """The text on one line: line breaks as spaces, what is invisible or moves the cursor as an escape, at most `limit`
    characters.

    Colours, titles and clickable addresses of a terminal begin with a control character, so none of them gets through.
    """
    whole = str(text)
    part = _BREAKS.sub(" ", whole[:limit].strip()) if len(whole) > limit else _BREAKS.sub(" ", whole.strip())
    clean = "".join(_escaped(c) if unicodedata.category(c) in _UNSEEN and c not in _JOINERS else c for c in part)
    return f"{clean}... ({len(whole) - limit} more)" if len(whole) > limit else clean


def _escaped(character: str) -> str:
    return character.encode("unicode_escape").decode("ascii")
