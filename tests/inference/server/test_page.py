"""The start page: one file without foreign parts, within the policy that the server sends."""

from __future__ import annotations

import re
from html.parser import HTMLParser

import httpx
import pytest

from open_mythos.inference.server.app import read_page
from open_mythos.inference.server.depth import DepthPolicy
from open_mythos.inference.server.routes import policy_of
from tests.inference.server.fake_host import FakeHost
from tests.inference.server.running import Running

MOST_LINES, MOST_BYTES, LEAST_CONTRAST = 600, 40_000, 4.5
VOID = {"meta", "input"}


class Elements(HTMLParser):
    """Lists the elements of a page with their attributes, and checks that tags are closed."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self._open: list[str] = []
        self.feed(page)
        self.close()
        assert not self._open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))
        if tag not in VOID:
            self._open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def values(self, attribute: str) -> list[str]:
        return [attrs[attribute] or "" for _, attrs in self.found if attribute in attrs]


@pytest.fixture(scope="module")
def page() -> str:
    found = read_page()
    assert found is not None
    return found


@pytest.fixture(scope="module")
def elements(page: str) -> Elements:
    return Elements(page)


@pytest.fixture(scope="module")
def script(page: str) -> str:
    (found,) = re.findall(r"<script>(.*?)</script>", page, re.DOTALL)
    return found


@pytest.fixture(scope="module")
def style(page: str) -> str:
    (found,) = re.findall(r"<style>(.*?)</style>", page, re.DOTALL)
    return found


def test_it_is_small(page: str) -> None:
    assert len(page.splitlines()) <= MOST_LINES
    assert len(page.encode()) <= MOST_BYTES


def test_nothing_comes_from_elsewhere(page: str, elements: Elements) -> None:
    assert not re.findall(r"https?:|@import|url\(|\bimport\(|\bimport\s", page.replace(
        '<button type="button">import </button>', ""))  # fmt: skip
    assert not [tag for tag, _ in elements.found if tag in {"link", "img", "iframe", "object"}]
    assert not elements.values("src") + elements.values("href") + elements.values("action")


def test_the_policy_blocks_none_of_it(page: str, elements: Elements, script: str) -> None:
    names = {name for _, attrs in elements.found for name in attrs}
    assert not {name for name in names if name.startswith("on") or name == "style"}
    assert not re.findall(r"cssText|setAttribute\(.style|\.style\s*=|\bstyle:", script)
    policy = policy_of(page)
    assert len(re.findall("'sha256-", policy)) == 2
    assert "unsafe" not in policy


def test_text_is_never_read_as_markup(script: str) -> None:
    ways = r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\(|new Function|srcdoc"
    assert not re.findall(ways, script)


def test_ids_exist_once(elements: Elements, script: str, style: str) -> None:
    ids = elements.values("id")
    assert len(ids) == len(set(ids))
    used = set(re.findall(r'\b(?:one|number|on)\("([^"]+)"', script))
    assert len(used) > 20
    assert used <= set(ids)
    assert set(elements.values("for")) <= set(ids)
    lists = re.findall(r"for \(const id of \[(.*?)\]\)", script)
    assert lists
    assert set(re.findall(r'"([^"]+)"', " ".join(lists))) <= set(ids)
    named = set(re.findall(r"#([a-z][a-z-]*)\b(?=[^{}]*\{)", re.sub(r"\{[^{}]*\}", "{}", style)))
    assert named <= set(ids)


def test_fields_have_labels(elements: Elements) -> None:
    labelled = set(elements.values("for"))
    fields = [a for tag, a in elements.found if tag in {"input", "select", "textarea"}]
    assert len(fields) > 8
    assert not [a for a in fields if a.get("type") != "radio" and a.get("id") not in labelled]


def luminance(color: str) -> float:
    """Relative luminance of #rgb or #rrggbb, as WCAG 2 defines it."""
    digits = color[1:] if len(color) == 7 else "".join(2 * digit for digit in color[1:])
    channels = [int(digits[i : i + 2], 16) / 255 for i in (0, 2, 4)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return sum(w * c for w, c in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


def contrast(one: str, other: str) -> float:
    """Contrast of two colors, 1 to 21."""
    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


def palettes(style: str) -> list[dict[str, str]]:
    """Colors of the light and of the dark scheme."""
    return [
        dict(re.findall(r"--([a-z-]+): (#[0-9a-f]+);", block))
        for block in re.findall(r":root \{(.*?)\}", style, re.DOTALL)
    ]


def test_contrast_in_both_schemes(style: str) -> None:
    light, dark = palettes(style)
    for colors in (light, dark):
        pairs = [("ink", x) for x in ("paper", "code", "low", "middle", "high")]
        pairs += [("muted", "paper"), ("muted", "code"), ("warm", "paper"), ("on-accent", "accent")]
        weak = [(a, b) for a, b in pairs if contrast(colors[a], colors[b]) < LEAST_CONTRAST]
        assert not weak
        steps = [luminance(colors[name]) for name in ("low", "middle", "high")]
        # brightness alone orders the scale, for eyes that see no hues; from the paper's on
        assert steps == sorted(steps, reverse=colors is light)
        assert abs(steps[0] - luminance(colors["paper"])) < abs(
            steps[2] - luminance(colors["paper"])
        )


def test_motion_can_be_turned_off(style: str) -> None:
    animated = set(re.findall(r"([^{}]+)\{[^{}]*animation: (?!none)", style))
    stilled = re.findall(
        r"prefers-reduced-motion: reduce\) \{ (.+?) \{ animation: none; \} \}", style
    )
    assert {each.strip() for each in animated} == set(stilled)


def test_it_is_served_with_its_policy(page: str, shared: Running) -> None:
    answer = shared.client.get("/")
    assert (answer.status_code, answer.text) == (200, page)
    assert answer.headers["content-security-policy"] == policy_of(page)


def test_what_the_page_asks_of_the_models_route(shared: Running, start) -> None:
    def model(server: Running) -> dict:
        answer: httpx.Response = server.client.get("/v1/models")
        return answer.json()["data"][0]

    facts = model(shared)
    assert (facts["allowed_depth"], facts["chat_template"]) == ([2, 12], True)
    free = model(start(policy=DepthPolicy(allow_unvalidated=True)))
    assert free["allowed_depth"] == [1, 16]
    plain = model(start(FakeHost(dense=True), template=None))
    assert (plain["allowed_depth"], plain["chat_template"]) == (None, False)
