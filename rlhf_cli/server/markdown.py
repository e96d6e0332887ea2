"""Markdown of a model as HTML that is nothing but structure: no links, no images, no attributes, no HTML of its own."""

from __future__ import annotations

import nh3
from markdown_it import MarkdownIt

from rlhf_cli.text import visible

_BLOCKS = {"p", "br", "hr", "pre", "blockquote", "ul", "ol", "li", *(f"h{level}" for level in range(1, 7))}
_TABLES = {"table", "thead", "tbody", "tr", "th", "td"}
TAGS = frozenset({*_BLOCKS, *_TABLES, "strong", "em", "s", "code"})
"""The page's script builds these, and these alone, from what it gets."""

_MARKDOWN = MarkdownIt("commonmark", {"html": False, "linkify": False}).enable(["table", "strikethrough"])
_MARKDOWN.disable(["link", "image", "autolink", "reference", "html_inline", "html_block", "entity"])


def render(text: str) -> str:
    """`text` as sanitised HTML, hidden characters made visible first."""
    return nh3.clean(_MARKDOWN.render(visible(text)), tags=set(TAGS), attributes={}, url_schemes=set())
