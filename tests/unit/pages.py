"""Pages that pocketlm writes, as a browser would take them, read by Python's own HTML parser."""

from __future__ import annotations

import re
from collections import Counter
from html.parser import HTMLParser


class Page(HTMLParser):
    """Tags, attributes and text as a browser would take them."""

    VOID = ("meta", "!doctype")

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: Counter[str] = Counter()
        self.attributes: list[tuple[str, str | None]] = []
        self.open: list[str] = []
        self.text = ""
        self.parts: list[str] = []
        self.styles = ""
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags[tag] += 1
        self.attributes += attrs
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags[tag] += 1
        self.attributes += attrs

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] == "style":
            self.styles += data
        else:
            self.text += data
            self.parts.append(data)


def check_inert(html: str) -> Page:
    """A page that is well-formed, runs nothing and asks for nothing."""
    page = Page(html)
    assert page.open == []
    harmless = {"html", "head", "meta", "title", "style", "body", "header", "section", "h1", "h2", "h3", "p", "div"}
    harmless |= {"span", "strong", "figure", "figcaption", "pre", "dl", "dt", "dd", "table", "tr", "th", "td"}
    assert set(page.tags) <= harmless | {"svg", "path", "text", "polyline", "circle"}
    assert not [name for name, _ in page.attributes if name.startswith("on") or name in ("href", "src", "style")]
    assert not [value for _, value in page.attributes if "//" in (value or "")]
    assert not re.search(r"//|url\(|@import", page.styles)
    assert any((value or "").startswith("default-src 'none'; ") for _, value in page.attributes)
    assert len(html) < 2_000_000
    return page
