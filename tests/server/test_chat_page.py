"""The chat page in a real browser."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from typing import Any

import pytest
from running_server import Running, make_served, start

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
BROWSER = shutil.which("chromium")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(BROWSER is None, reason="there is no Chromium here"),
]
PATIENCE = 500_000  # milliseconds
KEY = "0123456789abcdef"


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as library:
        browser = library.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def served() -> Iterator[Running]:
    yield from start([make_served()])


class Page:
    """The page as a user sees it."""

    def __init__(self, browser: Any, url: str, **options: Any) -> None:
        self.context = browser.new_context(**options)
        self.context.set_default_timeout(PATIENCE)
        self.page = self.context.new_page()
        self.errors: list[str] = []
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))
        self.page.on(
            "console",
            lambda m: self.errors.append(m.text) if m.type == "error" else None,
        )
        self.page.goto(url)
        self.page.wait_for_selector("#model option", state="attached")

    def set(self, **values: str) -> None:
        for name, value in values.items():
            self.page.fill(f"#{name}", value)

    def say(self, text: str) -> None:
        self.page.fill("#input", text)
        self.page.press("#input", "Enter")

    def wait(self) -> None:
        """Wait for the end of an answer."""
        self.page.wait_for_selector("#stop", state="hidden")
        self.page.wait_for_selector(".waiting", state="detached")

    def texts(self) -> list[str]:
        return self.page.locator("#messages .text").all_text_contents()


@pytest.fixture
def page(browser, served) -> Iterator[Page]:
    page = Page(browser, served.url)
    page.set(seed="5", max_tokens="12", temperature="0.7")
    yield page
    page.context.close()


def test_a_conversation_with_branches_that_outlives_the_page(page, served):
    page.say("What is a fox?")
    page.wait()
    first = page.texts()
    assert first[0] == "What is a fox?" and len(first) == 2 and page.errors == []
    page.set(seed="6")
    page.page.click("text=Retry")
    page.wait()
    assert page.texts()[1] != first[1]
    page.page.click("[aria-label='The version before']")
    assert page.texts() == first
    page.page.click("text=Edit")
    page.page.fill(".edit", "What is a dog?")
    page.page.press(".edit", "Enter")
    page.wait()
    edited = page.texts()
    assert edited[0] == "What is a dog?" and len(edited) == 2
    page.say("And then?")
    page.wait()
    assert len(page.texts()) == 4
    scheduler = served.app.models.sources["tiny"].served.scheduler
    assert scheduler.cached_tokens > 0  # what was said before came from the cache
    page.page.reload()
    page.page.wait_for_selector("#messages li")
    assert page.texts()[:2] == edited
    page.page.click("[aria-label='The version before']")
    assert page.texts() == first


def test_an_answer_can_be_stopped_and_frees_its_place(page, served):
    page.set(max_tokens="16000", seed="1")
    page.say("Talk")
    page.page.wait_for_selector(".assistant .text:not(:empty)")
    page.page.keyboard.press("Escape")
    page.wait()
    assert page.texts()[1]
    page.set(max_tokens="3")
    page.say("More")
    page.wait()
    assert len(page.texts()) == 4 and page.errors == []


def test_tokens_tell_their_probabilities_by_mouse_and_keyboard(page):
    page.say("What is a fox?")
    page.wait()
    text = page.texts()[1]
    tokens = page.page.locator(".token")
    assert "".join(tokens.all_text_contents()) == text
    tokens.first.hover()
    tip = page.page.locator("#tip")
    assert "%" in tip.text_content() and tip.is_visible()
    page.page.locator(".assistant .text").focus()
    page.page.keyboard.press("ArrowRight")
    page.page.keyboard.press("ArrowRight")
    assert page.page.locator(".here").count() == 1
    assert "%" in page.page.locator("#status").text_content()


def test_text_is_never_markup(page):
    hostile = "<img src=x onerror=alert(1)><script>document.title='taken'</script>"
    page.say(hostile)
    page.wait()
    assert page.texts()[0] == hostile
    assert page.page.locator("#messages img, #messages script").count() == 0
    assert page.page.title() == "Receptance" and page.errors == []


def test_nothing_comes_from_elsewhere_and_nothing_else_may_run(browser, served):
    context = browser.new_context()
    page = context.new_page()
    asked: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    answer = page.goto(served.url)
    policy = answer.headers["content-security-policy"]
    assert "default-src 'none'" in policy and "unsafe" not in policy
    page.wait_for_selector("#model option", state="attached", timeout=PATIENCE)
    assert asked and all(url.startswith(served.url) for url in asked)
    blocked = page.evaluate(
        "() => { const s = document.createElement('script'); s.textContent = 'window.ran = 1';"
        " document.body.append(s); return window.ran === undefined; }"
    )
    assert blocked
    context.close()


def test_the_page_fits_a_phone(browser, served):
    page = Page(browser, served.url, viewport={"width": 360, "height": 640}, has_touch=True)
    page.page.click("#toggle-side")
    page.set(max_tokens="5")
    page.page.click("#toggle-side")
    page.say("a " * 200 + "word" * 100)
    page.wait()
    width = page.page.evaluate("document.documentElement.scrollWidth")
    assert width <= 360 and page.page.locator("#send").is_visible()
    page.context.close()


def test_everything_has_a_name_and_can_be_reached_by_keyboard(page):
    page.say("What is a fox?")
    page.wait()
    unnamed = page.page.evaluate(
        """() => [...document.querySelectorAll('button, input, select, textarea')]
          .filter(e => !(e.textContent.trim() || e.ariaLabel || e.labels?.length))
          .map(e => e.outerHTML)"""
    )
    assert unnamed == []
    page.page.focus("#input")
    reached = set()
    for _ in range(60):
        page.page.keyboard.press("Shift+Tab")
        reached.add(page.page.evaluate("document.activeElement.textContent.trim()"))
    assert {"New conversation", "Retry", "Edit", "Copy"} <= reached


def test_a_key_is_asked_for(browser, tmp_path):
    from receptance.server.keys import Keys

    (tmp_path / "keys").write_text(KEY)
    for running in start([make_served()], keys=Keys.read(tmp_path / "keys")):
        context = browser.new_context()
        page = context.new_page()
        page.goto(running.url)
        page.wait_for_selector("#notice:not([hidden])", timeout=PATIENCE)
        assert "API key" in page.locator("#notice").text_content()
        page.fill("#key", KEY)
        page.press("#key", "Tab")
        page.wait_for_selector("#model option", state="attached", timeout=PATIENCE)
        context.close()
