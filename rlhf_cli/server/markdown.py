"""Markdown of a model as HTML that is nothing but structure: no links, no images, no attributes, no HTML of its own."""

from __future__ import annotations

import nh3
from markdown_it import MarkdownIt

from rlhf_cli.text import visible

TAGS = frozenset(
    [
        "p",
        "br",
        "hr",
        "h1",
        "h2",
        "h3",
        "h4",
        "h5",
        "h6",
        "strong",
        "em",
        "s",
        "code",
        "pre",
        "blockquote",
        "ul",
        "ol",
        "li",
        "table",
        "thead",
        "tbody",
        "tr",
        "th",
        "td",
    ]
)
"""The page's script builds these, and these alone, from what it gets."""

_MARKDOWN = MarkdownIt("commonmark", {"html": False, "linkify": False}).enable(["table", "strikethrough"])
_MARKDOWN.disable(["link", "image", "autolink", "reference", "html_inline", "html_block", "entity"])


def render(text: str) -> str:
    """`text` as sanitised HTML, hidden characters made visible first."""
    return nh3.clean(_MARKDOWN.render(visible(text)), tags=set(TAGS), attributes={}, url_schemes=set())
