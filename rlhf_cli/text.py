"""What must not be shown as it is: model text is hostile, and addresses may hold a password."""

from __future__ import annotations

import re

# Controls (a terminal obeys them), bidirectional marks (they reorder what is read), separators and blanks without
# width (they hide things), tag characters (they smuggle text), halves of surrogate pairs (no encoder takes them).
_HIDDEN = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\xad\u061c\u180e\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb"
    "\U000e0000-\U000e007f\ud800-\udfff]"
)

_USERINFO = re.compile(r"://[^\s'\"]*@")


def without_userinfo(text: str) -> str:
    """`text` with what stands before the host of an address, a name and a password, as `...`."""
    return _USERINFO.sub("://...@", text)


def visible(text: str) -> str:
    """`text` with every control, bidirectional and invisible character replaced by a visible name of it.

    Newlines and tabs stay. An escape becomes the picture `\u241b`, a right-to-left override `<U+202E>`.
    """
    return _HIDDEN.sub(_name, text)


def one_line(text: str) -> str:
    """`visible`, with newlines and tabs as visible pictures too."""
    return visible(text).replace("\n", "\u240a").replace("\t", "\u2409")


def _name(match: re.Match[str]) -> str:
    code = ord(match[0])
    if code < 0x20:
        return chr(0x2400 + code)
    return "\u2421" if code == 0x7F else f"<U+{code:04X}>"
