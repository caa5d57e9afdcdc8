"""Parse a page without a browser."""

from __future__ import annotations

from collections import Counter
from html.parser import HTMLParser

HOSTILE = "</style></script><script>alert(1)</script><img src=x onerror=a(2)>\u2028]]>{{ 7 * 7 }}"
VOID = {"meta", "input"}


class Reader(HTMLParser):
    """Tags, attributes and text of a page; unbalanced tags fail."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: Counter[str] = Counter()
        self.attributes: list[tuple[str, str | None]] = []
        self.words: list[str] = []
        self.open: list[str] = []
        self.feed(text)
        self.close()
        assert not self.open
        self.text = " ".join(" ".join(self.words).split())

    def handle_starttag(self, tag, attrs):
        self.tags[tag] += 1
        self.attributes += attrs
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags[tag] += 1
        self.attributes += attrs

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open[-1:] not in (["script"], ["style"]):
            self.words.append(data)


def assert_self_contained(text: str, scripts: int) -> Reader:
    """Assert that a page loads nothing, runs only its own scripts and adapts to the screen."""
    for reference in ("http:", "https:", "url(", "@import", " src=", " href=", "fetch("):
        assert reference not in text, reference
    assert "default-src 'none'" in text
    assert "prefers-color-scheme: dark" in text
    assert 'name="viewport"' in text
    read = Reader(text)
    assert read.tags["script"] == scripts
    assert not {"link", "img", "iframe"} & set(read.tags)
    assert not [name for name, _ in read.attributes if name.startswith("on")]
    labels = [value for name, value in read.attributes if name == "aria-label"]
    assert len(labels) == read.tags["svg"]
    assert all(labels)
    ids = [value for name, value in read.attributes if name == "id"]
    assert len(ids) == len(set(ids))
    # no color placeholder is left
    assert "#fe00" not in text
    assert "#fd00" not in text
    return read
