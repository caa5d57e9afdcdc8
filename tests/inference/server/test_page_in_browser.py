"""The start page in a real browser, with the toy model behind the real server."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from open_mythos.inference.request import Outcome
from open_mythos.inference.server.auth import Keys
from tests.inference.server.browser import CHROMIUM, Browser
from tests.inference.server.fake_host import FakeHost
from tests.inference.server.running import Running, wait_for
from tests.inference.server.test_page import LEAST_CONTRAST

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="needs chromium"),
]
PROMPT = "déjà vu\n<b>bold</b>"
DONE = "!document.querySelector('.busy') && document.querySelector('.bar button')"
TEXT = "[...document.querySelectorAll('.answer .t')].map(t => t.textContent).join('')"
CONTRASTS = """(() => {
  const pixel = new OffscreenCanvas(1, 1).getContext("2d", { willReadFrequently: true });
  const luminance = (color) => {
    pixel.fillStyle = color;
    pixel.fillRect(0, 0, 1, 1);
    const linear = [...pixel.getImageData(0, 0, 1, 1).data.slice(0, 3)].map((byte) => byte / 255)
      .map((c) => (c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4));
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2];
  };
  return [...document.querySelectorAll(".tint")].map((node) => {
    const style = getComputedStyle(node);
    const [ink, ground] = [luminance(style.color), luminance(style.backgroundColor)];
    const contrast = (Math.max(ink, ground) + 0.05) / (Math.min(ink, ground) + 0.05);
    return [Number(node.style.getPropertyValue("--p")), contrast];
  });
})()"""


@pytest.fixture
def open_page(tmp_path: Path) -> Iterator[Callable[..., Browser]]:
    """Open pages that are closed with the test."""
    opened: list[Browser] = []

    def begin(server: Running, **options: Any) -> Browser:
        browser = Browser(tmp_path / str(len(opened)), server.url, **options)
        opened.append(browser)
        return browser

    yield begin
    for each in opened:
        each.end()


def ready(browser: Browser) -> Browser:
    browser.wait("document.querySelector('#prompt:not([disabled])') !== null")
    return browser


def ask(browser: Browser, prompt: str, tokens: int) -> None:
    browser.choose("#max-tokens", str(tokens))
    browser.type(prompt, "#prompt")
    browser.press("Enter")


@pytest.mark.parametrize(("width", "dark"), [(1280, False), (390, True)])
def test_text_depths_and_details(start, open_page, width, dark):
    server = start(template=None)
    browser = ready(open_page(server, width=width, dark=dark))
    browser.choose("#temperature", "0")
    browser.choose("#rule", "gate")
    browser.choose("#depth", "6")
    assert browser.js("document.querySelector('#depth-now').textContent") == "at most 6 loops"
    n = len(PROMPT.encode())
    ask(browser, PROMPT, n)
    browser.wait(DONE)
    assert browser.js(TEXT) == PROMPT  # markup stays text, characters of several tokens whole
    assert browser.js("document.querySelectorAll('.strip b').length") == n
    (request,) = server.host.requests
    assert (request.max_loops, request.min_loops, request.rule) == (6, 1, "gate")
    heights = browser.js(
        "[...document.querySelectorAll('.strip b')].map(b => b.style.getPropertyValue('--n'))"
    )
    assert [int(each) for each in heights] == [1 + i % 6 for i in range(n)]
    assert browser.js("document.querySelector('.answer dl').textContent").startswith(f"tokens{n}")

    # the keyboard reaches every token
    browser.js("document.querySelector('.text').focus()")
    for key in ("End", "ArrowRight", "ArrowLeft"):
        browser.press(key)
    detail = browser.js("document.querySelector('#detail').innerText")
    assert f"{n - 1} of {n}" in detail
    assert "-0.500" in detail
    assert "61 %" in detail
    assert browser.js("document.querySelectorAll('.strip b.now').length") == 1

    contrasts = browser.js(CONTRASTS)
    assert len({p for p, _ in contrasts}) >= 6
    assert min(each for _, each in contrasts) >= LEAST_CONTRAST
    assert browser.js("document.documentElement.scrollWidth") <= width
    assert not browser.complaints


def test_another_depth_beside_the_first(start, open_page, monkeypatch):
    def deeper_is_other(request, i):
        return 65 + i + (i >= 5 and request.max_loops > 3)

    monkeypatch.setattr("tests.inference.server.fake_host.toy_token", deeper_is_other)
    server = start(template=None)
    browser = ready(open_page(server))
    browser.choose("#depth", "3")
    ask(browser, "abc", 12)
    browser.wait(DONE)
    for loops in ("12 loops", "2 loops"):
        browser.choose(".bar select", loops)
        browser.click(".bar button")
        browser.wait(
            f"[...document.querySelectorAll('h2')].some(h => h.textContent.startsWith('{loops}'))"
        )
        browser.wait(DONE)
    first, deeper, same = server.host.requests
    assert [r.max_loops for r in (first, deeper, same)] == [3, 12, 2]
    assert first.key == deeper.key == same.key
    notes = browser.js("[...document.querySelectorAll('.answer h2 span')].map(s => s.textContent)")
    assert notes == ["", "differs from token 6 on", "same tokens"]
    marked = browser.js("[...document.querySelectorAll('.t.differs')].map(t => t.textContent)")
    assert marked == ["F", "G"]
    assert not browser.complaints


def test_chat_sends_what_was_said(start, open_page):
    server = start()
    browser = ready(open_page(server))
    for text in ("hello", "again"):
        ask(browser, text, 4)
        browser.wait(DONE)
        browser.wait(f"document.querySelectorAll('.bar').length === {1 + (text == 'again')}")
    first, second = (bytes(i for i in r.prompt if i < 256).decode() for r in server.host.requests)
    assert "user: hello" in first
    assert "user: hello" in second
    assert "user: again" in second
    browser.click("[name=mode][value=text]")
    browser.click("#clear")
    assert browser.js("document.querySelector('#prompt-name').textContent") == "Text to continue"
    assert browser.js("document.querySelectorAll('.turn').length") == 0
    assert not browser.complaints


def test_stop(start, open_page):
    host = FakeHost()
    server = start(host, template=None)
    browser = ready(open_page(server))
    host.delay = 0.02
    ask(browser, "abc", 200)
    browser.wait("document.querySelectorAll('.t').length > 3")
    browser.press("Escape")
    browser.wait(DONE)
    wait_for(lambda: Outcome.CANCELLED in host.cancelled.values())
    assert browser.js("document.querySelector('.answer dl').textContent").endswith("you")
    assert browser.js("document.querySelector('.error:not([hidden])')") is None


@pytest.mark.parametrize("after", [None, 5])
def test_errors_are_shown(start, open_page, after):
    """Before the first chunk, with a status; and within a stream."""
    host = FakeHost()
    host.fail_after = after
    browser = ready(open_page(start(host, template=None)))
    ask(browser, "abc", 100 if after else 1000)
    browser.wait("document.querySelector('.answer .error')")
    shown = browser.js("document.querySelector('.answer .error').textContent")
    assert ("not finite" if after else "exceed the context of 256") in shown
    assert browser.js("document.querySelectorAll('.t').length") == (after or 0)
    assert browser.js("!document.querySelector('#send').hidden")
    # what failed before it began can be corrected and sent again
    assert browser.js("document.querySelector('#prompt').value") == ("" if after else "abc")


def test_a_key_is_asked_for(start, open_page):
    browser = open_page(start(template=None, keys=Keys(["secret"])))
    browser.wait("document.querySelector('#key-part:not([hidden])')")
    assert "key" in browser.js("document.querySelector('#trouble').textContent")
    browser.type("secret", "#key")
    browser.press("Enter")
    ready(browser)
    assert browser.js("document.querySelector('#key-part').hidden")
    ask(browser, "abc", 3)
    browser.wait(DONE)
    assert browser.js("Object.values(sessionStorage)") == ["secret"]
    assert browser.js("localStorage.length") == 0


def test_a_model_without_loops(start, open_page):
    browser = ready(open_page(start(
        FakeHost(dense=True, trained_depth=None, validated_depth=None, rules=[]), template=None
    )))  # fmt: skip
    assert browser.js("document.querySelector('#depth-part').hidden")
    ask(browser, "abc", 3)
    browser.wait(DONE)
    assert browser.js("document.querySelector('.chart').hidden")
    assert browser.js("document.querySelectorAll('.answer .tint').length") == 0
