"""The chat page in a real Chromium: send, stream, switch adapter, blend, stop, Chinese."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from loraserve.engine.service import Service
from loraserve.server import create_app
from tests.server.conftest import CHAINS, Live, text_of, write_adapter

CHROMIUM = Path("/usr/bin/chromium")
ARGS = [
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync",
]  # fmt: skip
EVIL = "<img src=x onerror=\"document.title='owned'\"><b>bold</b>"

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
pytestmark = pytest.mark.skipif(not CHROMIUM.exists(), reason=f"no browser at {CHROMIUM}")


@pytest.fixture(scope="module")
def service(make_service: Callable[..., Service]) -> Service:
    return make_service()


@pytest.fixture(scope="module")
def site(service: Service) -> Iterator[Live]:
    live = Live(create_app(service))
    yield live
    live.close()


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=str(CHROMIUM), args=ARGS)
        yield browser
        browser.close()


class Page:
    """A visit to the chat page."""

    def __init__(self, browser: Any, url: str, **context: Any) -> None:
        self.context = browser.new_context(**context)
        self.page = self.context.new_page()
        self.errors: list[str] = []
        self.foreign: list[str] = []
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))
        self.page.on("request", lambda request: request.url.startswith(url) or self.foreign.append(request.url))
        self.page.goto(url)
        self.page.wait_for_selector("#status[data-state=ready]")

    def pick(self, voice: str) -> None:
        self.page.locator(f".chip:has(input[value='{voice}'])").click()

    def say(self, text: str, *, wait: bool = True) -> None:
        self.page.fill("#input", text)
        self.page.keyboard.press("Enter")
        if wait:
            self.page.wait_for_selector("#composer:not(.running)")

    def last(self) -> tuple[str, str]:
        """The SPEC on the last answer's badge, and its text."""
        message = self.page.locator(".message.assistant").last
        return message.locator(".badge").get_attribute("data-spec"), message.locator(".text").inner_text()


@pytest.fixture
def visit(browser: Any, site: Live) -> Iterator[Callable[..., Page]]:
    pages = []

    def open_page(**context: Any) -> Page:
        pages.append(Page(browser, site.url, **context))
        return pages[-1]

    yield open_page
    for page in pages:
        assert not page.errors and not page.foreign
        page.context.close()


def test_each_message_is_answered_by_whom_was_picked(visit: Callable[..., Page]) -> None:
    page = visit()
    assert page.page.locator("#empty").is_visible()
    page.say("Who are you?")
    assert page.last() == ("base", text_of("base"))
    assert not page.page.locator("#empty").is_visible()
    page.pick("pirate")
    page.say("And now?")
    assert page.last() == ("pirate", text_of("pirate"))
    page.pick("poet")
    page.say("And now?")
    assert page.last() == ("poet", text_of("poet"))
    badges = page.page.locator(".message .badge").evaluate_all("nodes => nodes.map((node) => node.dataset.spec)")
    assert badges == ["base", "pirate", "poet"]
    assert "tok/s" in page.page.locator(".message .stats").last.inner_text()


def test_a_blend_is_mixed_with_sliders(visit: Callable[..., Page]) -> None:
    page = visit()
    page.pick("pirate")
    page.pick("+")
    assert page.page.locator("#blend").is_visible()
    for name, scale in (("caller", "0"), ("pirate", "0.3"), ("poet", "0.7")):
        page.page.locator(f"#mixer input[data-adapter={name}]").fill(scale)
    assert page.page.locator("#spec").inner_text() == "pirate:0.3+poet:0.7"
    page.say("Who are you?")
    assert page.last() == ("pirate:0.3+poet:0.7", text_of("poet"))
    assert page.page.locator(".badge").inner_text() == "pirate 0.3 + poet 0.7"


def test_an_answer_streams_and_can_be_stopped(visit: Callable[..., Page], service: Service) -> None:
    page = visit()
    page.pick("forever")
    page.say("Sing!", wait=False)
    page.page.locator(".assistant .text", has_text="la-la~" * 20).wait_for()
    assert page.page.locator("#composer.running").count() == 1, "text is shown while more is coming"
    page.page.click("#send")
    page.page.wait_for_selector("#composer:not(.running)")
    assert page.last()[1].startswith("la-la~")
    assert "stopped" in page.page.locator(".stats").inner_text()
    page.page.wait_for_timeout(100)
    page.pick("pirate")
    page.say("Enough.")
    assert page.last() == ("pirate", text_of("pirate"))
    for _ in range(100):
        if service.stats()["requests_running"] == 0:
            break
        page.page.wait_for_timeout(50)
    assert service.stats()["requests_running"] == 0


def test_regenerate_asks_whoever_is_picked_now_and_clear_forgets(visit: Callable[..., Page]) -> None:
    page = visit()
    page.say("Who are you?")
    page.pick("pirate")
    page.page.locator(".again").last.click()
    page.page.wait_for_selector(".badge[data-spec=pirate]")
    page.page.wait_for_selector("#composer:not(.running)")
    assert page.last() == ("pirate", text_of("pirate"))
    assert page.page.locator(".message").count() == 2
    page.page.reload()
    page.page.wait_for_selector("#status[data-state=ready]")
    assert page.last() == ("pirate", text_of("pirate")), "a reload keeps the conversation"
    page.page.click("#clear")
    assert page.page.locator(".message").count() == 0 and page.page.locator("#empty").is_visible()


def test_a_chinese_browser_gets_a_chinese_page(visit: Callable[..., Page]) -> None:
    page = visit(locale="zh-CN", viewport={"width": 390, "height": 844})
    assert page.page.locator("h1").inner_text() == "一个基座，百变声音"
    assert page.page.evaluate("document.documentElement.scrollWidth <= innerWidth"), "it fits a phone"
    page.pick("poet")
    page.page.locator("#examples button").first.click()
    page.page.wait_for_selector(".assistant:not(.writing)")
    assert page.page.locator(".message.user").inner_text() == "你是谁？是谁创造了你？"
    assert page.last() == ("poet", text_of("poet"))
    page.page.click("#language")
    assert page.page.locator("#input").get_attribute("placeholder") == "Say something…"
    assert page.page.evaluate("document.documentElement.lang") == "en"


def test_enter_sends_shift_enter_does_not_nor_does_composing(visit: Callable[..., Page]) -> None:
    page = visit()
    page.page.fill("#input", "one")
    page.page.keyboard.press("Shift+Enter")
    page.page.keyboard.type("two")
    compose = "new KeyboardEvent('keydown', {key: 'Enter', isComposing: true, bubbles: true, cancelable: true})"
    page.page.evaluate(f"document.getElementById('input').dispatchEvent({compose})")
    assert page.page.locator(".message").count() == 0
    page.page.keyboard.press("Enter")
    page.page.wait_for_selector(".assistant:not(.writing)")
    assert page.page.locator(".message.user .text").text_content() == "one\ntwo"


def test_settings_reach_the_request_and_errors_show_the_servers_message(visit: Callable[..., Page]) -> None:
    page = visit()
    page.page.click("#open-settings")
    page.page.fill("#max-tokens", "2")
    page.page.fill("#system-prompt", "Be brief.")
    page.page.locator("#temperature").fill("0")
    page.page.keyboard.press("Escape")
    with page.page.expect_request("**/v1/chat/completions") as sent:
        page.say("Who are you?")
    body = sent.value.post_data_json
    assert body["messages"][0] == {"role": "system", "content": "Be brief."}
    assert (body["temperature"], body["max_tokens"], body["adapter"]) == (0, 2, "base")
    assert page.last()[1] == "Hello there" and "max tokens" in page.page.locator(".stats").inner_text()
    page.page.evaluate("document.getElementById('max-tokens').value = 10000000")
    page.page.evaluate("document.getElementById('max-tokens').dispatchEvent(new Event('input'))")
    page.say("More!")
    error = page.page.locator(".message.error")
    assert "max_tokens 10000000" in error.inner_text()
    page.page.evaluate("document.getElementById('max-tokens').value = ''")
    page.page.evaluate("document.getElementById('max-tokens').dispatchEvent(new Event('input'))")
    error.locator("button").click()
    page.page.wait_for_selector(".assistant.last:not(.writing)")
    assert page.last() == ("base", text_of("base")) and error.count() == 0


def test_nothing_that_is_said_becomes_markup(visit: Callable[..., Page]) -> None:
    page = visit()
    page.say(EVIL)
    assert page.page.locator(".message.user .text").text_content() == EVIL
    assert page.page.locator(".message img, .message b").count() == 0
    assert page.page.title() == "loraserve"


def test_new_and_broken_adapters_appear_without_a_reload(visit: Callable[..., Page], service: Service) -> None:
    page = visit()
    write_adapter(service.registry.root / "newcomer", service.base, CHAINS["pirate"][0])
    broken = write_adapter(service.registry.root / "broken", service.base, CHAINS["pirate"][0])
    (broken / "adapter_model.safetensors").write_bytes(b"broken")
    page.page.evaluate("dispatchEvent(new Event('focus'))")
    page.page.wait_for_selector(".chip:has(input[value=newcomer])")
    page.pick("newcomer")
    page.say("Who are you?")
    assert page.last() == ("newcomer", text_of("pirate"))
    assert page.page.locator(".chip input[value=broken]").is_disabled()


def test_a_conversation_beyond_the_context_forgets_its_beginning(
    browser: Any, make_service: Callable[..., Service]
) -> None:
    live = Live(create_app(make_service(max_model_len=160)))
    page = Page(browser, live.url)
    page.pick("pirate")
    for i in range(4):
        page.say(f"question number {i}, spoken at some length")
        assert page.last() == ("pirate", text_of("pirate"))
    assert "left out" in page.page.locator(".stats").last.inner_text()
    page.context.close()
    live.close()


def test_of_very_many_adapters_a_part_is_shown_and_a_filter_finds_the_others(
    browser: Any, make_service: Callable[..., Service]
) -> None:
    service = make_service()
    for i in range(150):
        write_adapter(service.registry.root / f"many-{i:03}", service.base, CHAINS["poet" if i % 2 else "pirate"][0])
    live = Live(create_app(service))
    page = Page(browser, live.url, viewport={"width": 390, "height": 844})
    shown = page.page.locator(".chip input")
    page.page.wait_for_selector(".chip:has(input[value=many-000])")
    assert shown.count() == 102 and "filter" in page.page.locator(".hint").inner_text(), "the base, a hundred, blending"
    assert page.page.evaluate("document.documentElement.scrollWidth <= innerWidth"), "it fits a phone"
    page.page.fill("#voice-filter", "Y-14")
    page.page.wait_for_selector(".chip:has(input[value=many-149])")
    assert shown.count() == 12 and page.page.locator(".hint").count() == 0
    page.pick("many-141")
    page.say("Who are you?")
    assert page.last() == ("many-141", text_of("poet"))
    page.page.fill("#voice-filter", "many-000")
    page.page.wait_for_selector(".chip:has(input[value=many-000])")
    assert page.page.locator(".chip input[value=many-141]").is_checked(), "whoever is picked stays on show"
    page.pick("+")
    for name, scale in (("many-000", "0.9"), ("many-141", "0.1")):
        page.page.locator(f"#mixer input[data-adapter={name}]").fill(scale)
    page.page.fill("#voice-filter", "nobody")
    page.page.wait_for_timeout(500)
    page.say("And now?")
    assert page.last() == ("many-141:0.1+many-000:0.9", text_of("pirate"))
    page.page.reload()
    page.page.wait_for_selector("#status[data-state=ready]")
    page.say("Still there?")
    assert page.last() == ("many-141:0.1+many-000:0.9", text_of("pirate")), "a reload keeps those not on the page"
    assert not page.errors
    page.context.close()
    live.close()
