"""What a person sees and does on the chat page, in a real browser, over a scripted gateway."""

import json
import re
from collections.abc import Callable
from typing import Any

import pytest
from playwright.sync_api import Locator, Page, Route, expect

from .stage import ACCENTS, ANSWER, Stage

pytestmark = pytest.mark.browser

Visit = Callable[..., Page]
QUESTION = "What is the capital of France?"


def settle(page: Page, state: str = "ready") -> None:
    """Wait for what the page says it is doing."""
    expect(page.locator("body")).to_have_attribute("data-state", state)


def say(page: Page, model: str, text: str = QUESTION) -> Locator:
    """Pick the play, send a message with the keyboard, give back the place of its answer."""
    settle(page)
    page.locator("#model").select_option(model)
    page.locator("#input").fill(text)
    page.locator("#input").press("Enter")
    return page.locator('[data-role="assistant"]').last


def metric(answer: Locator, name: str) -> Locator:
    return answer.locator(f'[data-metric="{name}"]')


def at_end(page: Page) -> bool:
    gap = page.evaluate("document.documentElement.scrollHeight - innerHeight - scrollY")
    return bool(gap < 2)


# ---- An answer and what it cost


def test_an_answer_streams_in_and_shows_its_cost(stage: Stage, visit: Visit) -> None:
    page = visit(stage.url)
    answer = say(page, "good")
    expect(answer.locator(".text")).to_have_text(ANSWER)
    expect(metric(answer, "ttft")).to_have_text(re.compile(r"^\d[\d,]* ms$"))
    # On a busy machine a short answer can arrive in one read; the next test but one has the clock.
    expect(metric(answer, "tps")).to_have_text(re.compile(r"^[\d,.]+ tokens/s$|^too short"))
    expect(metric(answer, "tokens")).to_have_text("24 in, 8 out")
    expect(answer.get_by_role("heading")).to_have_text("good")
    expect(answer.locator(".note")).to_be_hidden()
    expect(page.locator('[data-role="user"] .text')).to_have_text(QUESTION)
    expect(page.locator("#input")).to_have_value("")
    expect(page.locator("#input")).to_be_focused()


def test_the_request_asks_for_a_stream_with_its_usage(stage: Stage, visit: Visit) -> None:
    page = visit(stage.url)
    expect(say(page, "good").locator(".text")).to_have_text(ANSWER)
    assert stage.asked == [
        {
            "model": "good",
            "messages": [{"role": "user", "content": QUESTION}],
            "stream": True,
            "stream_options": {"include_usage": True},
        }
    ]


def test_the_clock_of_the_metrics(stage: Stage, visit: Visit) -> None:
    """With time in the test's hand: the wait runs to the first text, the speed leaves it out."""
    clock = "window.now = 1000; performance.now = () => window.now;"
    page = visit(stage.url, script=clock)
    answer = say(page, "paced")
    settle(page, "waiting")
    page.evaluate("now = 2234")
    stage.release()
    expect(metric(answer, "ttft")).to_have_text("1,234 ms")
    expect(metric(answer, "tps")).to_have_text("…")
    page.evaluate("now = 2734")
    stage.release()
    # Seven tokens after the first one, in half a second.
    expect(metric(answer, "tps")).to_have_text("14 tokens/s")
    expect(metric(answer, "ttft")).to_have_text("1,234 ms")


def test_bytes_may_be_cut_anywhere(stage: Stage, visit: Visit) -> None:
    """Whatever the network joins, the page's reader hands out one byte at a time."""
    cut = """
    const whole = ReadableStreamDefaultReader.prototype.read;
    const bytes = [];
    ReadableStreamDefaultReader.prototype.read = async function () {
      if (bytes.length === 0) bytes.push(...((await whole.call(this)).value ?? []));
      return { value: Uint8Array.from(bytes.slice(0, 1)), done: bytes.shift() === undefined };
    };
    """
    page = visit(stage.url, script=cut)
    answer = say(page, "split")
    expect(metric(answer, "tokens")).to_have_text("24 in, 8 out")
    expect(answer.locator(".text")).to_have_text(ACCENTS)


def test_what_was_not_reported_is_not_guessed(stage: Stage, visit: Visit) -> None:
    answer = say(visit(stage.url), "no-usage")
    expect(metric(answer, "tokens")).to_have_text("not reported")
    expect(metric(answer, "tps")).to_have_text("not reported")
    expect(metric(answer, "ttft")).to_have_text(re.compile(r"^\d[\d,]* ms$"))


def test_an_answer_in_one_piece_has_no_speed(stage: Stage, visit: Visit) -> None:
    answer = say(visit(stage.url), "lump")
    expect(metric(answer, "tps")).to_have_text("too short to measure")
    expect(metric(answer, "tokens")).to_have_text("24 in, 8 out")


def test_the_token_limit_and_an_empty_answer_are_named(stage: Stage, visit: Visit) -> None:
    page = visit(stage.url)
    expect(say(page, "limit").locator(".note")).to_have_text(re.compile("Ended at the token limit"))
    answer = say(page, "empty")
    expect(answer.locator(".note")).to_contain_text("The model gave an empty answer.")
    expect(answer.locator(".cost")).to_be_hidden()


def test_text_is_text_and_fenced_code_stands_apart(stage: Stage, visit: Visit) -> None:
    page = visit(stage.url, viewport={"width": 320, "height": 640})
    answer = say(page, "code", "<img src=x onerror=alert(1)>")
    settle(page)
    expect(answer.locator(".text > p:visible")).to_have_text(
        ["Before <b>bold</b>.", "After it\n```inline``` too."], use_inner_text=True
    )
    code = answer.locator("pre")
    expect(code).to_have_count(2)
    expect(code.first).to_have_text("print('<i>hi</i>')\n" + "x" * 200, use_inner_text=True)
    expect(code.last).to_have_text("last")
    assert page.locator("main img, main b, main i").count() == 0
    # The wide line scrolls in its box, which the keyboard can reach; the page stays put.
    assert code.first.evaluate("box => box.scrollWidth > box.clientWidth && box.tabIndex === 0")
    assert page.evaluate("document.documentElement.scrollWidth") <= 320


# ---- A conversation


def test_a_conversation_is_sent_whole_and_a_new_chat_forgets_it(stage: Stage, visit: Visit) -> None:
    page = visit(stage.url)
    expect(page.get_by_role("button", name="New chat")).to_be_disabled()
    say(page, "good", "One")
    say(page, "http-500", "Unanswered")
    say(page, "good", "Two")
    settle(page)
    assert [turn["content"] for turn in stage.asked[-1]["messages"]] == ["One", ANSWER, "Two"]

    page.get_by_role("button", name="New chat").click()
    expect(page.locator("article")).to_have_count(0)
    expect(page.get_by_role("heading", name="Ask a model")).to_be_visible()
    expect(page.locator("#input")).to_be_focused()
    say(page, "good", "Three")
    settle(page)
    assert [turn["content"] for turn in stage.asked[-1]["messages"]] == ["Three"]


def test_a_new_chat_ends_the_answer_that_still_runs(stage: Stage, visit: Visit) -> None:
    page = visit(stage.url)
    expect(say(page, "slow").locator(".text")).to_have_text("The capital")
    page.get_by_role("button", name="New chat").click()
    settle(page)
    expect(page.locator("article")).to_have_count(0)
    assert stage.hung_up.wait(20)
    expect(say(page, "good").locator(".text")).to_have_text(ANSWER)
    expect(page.locator("article")).to_have_count(2)


def test_settings_are_sent_and_a_wrong_one_is_shown(stage: Stage, visit: Visit) -> None:
    page = visit(stage.url)
    settle(page)
    page.locator("summary").press("Enter")
    page.get_by_label("Temperature").fill("7")
    page.get_by_label("Max tokens").fill("64")
    page.get_by_label("System prompt").fill("Be brief.")
    page.get_by_label("System prompt").press("Escape")
    expect(page.locator("#panel")).to_be_hidden()
    expect(page.locator("summary")).to_be_focused()

    answer = say(page, "good")
    expect(answer).to_have_count(0)
    expect(page.get_by_label("Temperature")).to_be_focused()
    page.get_by_label("Temperature").fill("0.5")
    page.locator("#send").click()
    expect(answer.locator(".text")).to_have_text(ANSWER)
    expect(page.locator("#panel")).to_be_hidden()
    asked = stage.asked[0]
    assert (asked["temperature"], asked["max_tokens"]) == (0.5, 64)
    assert asked["messages"][0] == {"role": "system", "content": "Be brief."}


# ---- The keyboard


def test_enter_sends_and_shift_enter_starts_a_line(stage: Stage, visit: Visit) -> None:
    page = visit(stage.url)
    settle(page)
    expect(page.locator("#input")).to_be_focused()
    expect(page.locator("#send")).to_be_disabled()
    page.keyboard.type("  ")
    page.keyboard.press("Enter")
    expect(page.locator("#send")).to_be_disabled()
    page.locator("#model").select_option("good")
    page.locator("#input").fill("One")
    page.keyboard.press("Shift+Enter")
    page.keyboard.type("Two")
    expect(page.locator("#send")).to_be_enabled()
    page.keyboard.press("Enter")
    settle(page)
    assert stage.asked[0]["messages"][0]["content"] == "One\nTwo"
    assert len(stage.asked) == 1


@pytest.mark.parametrize("composing", [{"isComposing": True}, {"keyCode": 229}])
def test_enter_that_ends_a_composition_does_not_send(
    stage: Stage, visit: Visit, composing: dict[str, Any]
) -> None:
    page = visit(stage.url)
    settle(page)
    page.locator("#input").fill("とうきょう")
    page.locator("#input").dispatch_event("keydown", {"key": "Enter", "bubbles": True} | composing)
    expect(page.locator("#input")).to_have_value("とうきょう")
    expect(page.locator("article")).to_have_count(0)


@pytest.mark.parametrize("how", ["Escape", "click", "focused button"])
def test_stop_keeps_what_was_said(stage: Stage, visit: Visit, how: str) -> None:
    page = visit(stage.url)
    answer = say(page, "slow")
    expect(answer.locator(".text")).to_have_text("The capital")
    expect(page.locator("#status")).to_have_text("Answering…")
    expect(page.locator("#send")).to_be_hidden()
    if how == "Escape":
        page.keyboard.press("Escape")
    elif how == "click":
        page.locator("#stop").click()
    else:
        page.locator("#stop").press("Enter")
    expect(answer.locator(".note")).to_contain_text("Stopped.")
    expect(answer.locator(".text")).to_have_text("The capital")
    expect(metric(answer, "tokens")).to_have_text("not reported")
    expect(answer).to_have_attribute("aria-busy", "false")
    expect(page.locator("#input")).to_be_focused()
    assert stage.hung_up.wait(20), "the gateway never heard of it"


def test_stop_before_the_first_token(stage: Stage, visit: Visit) -> None:
    page = visit(stage.url)
    answer = say(page, "silent")
    expect(page.locator("#status")).to_have_text("Waiting for the first token…")
    page.keyboard.press("Escape")
    expect(answer.locator(".note")).to_contain_text("Stopped.")
    expect(answer.locator(".cost")).to_be_hidden()


def test_the_next_message_can_be_written_but_not_sent_meanwhile(stage: Stage, visit: Visit) -> None:
    page = visit(stage.url)
    answer = say(page, "slow")
    settle(page, "answering")
    page.keyboard.type("And then?")
    page.keyboard.press("Enter")
    expect(page.locator("#input")).to_have_value("And then?")
    stage.go.set()
    expect(answer.locator(".text")).to_have_text(ANSWER)
    expect(page.locator("#send")).to_be_enabled()
    expect(page.locator("#input")).to_be_focused()
    assert len(stage.asked) == 1


def test_the_focus_does_not_fall_with_the_stop_button(stage: Stage, visit: Visit) -> None:
    page = visit(stage.url)
    say(page, "slow")
    settle(page, "answering")
    page.locator("#stop").focus()
    stage.go.set()
    settle(page)
    expect(page.locator("#input")).to_be_focused()


# ---- When things go wrong


def test_an_error_in_mid_stream_keeps_the_text_and_offers_a_retry(
    stage: Stage, visit: Visit
) -> None:
    page = visit(stage.url)
    answer = say(page, "broken")
    expect(answer.locator(".text")).to_have_text("The capital of")
    stage.go.set()
    expect(answer.locator(".note")).to_contain_text(
        "The answer was cut off. The engine ran out of memory."
    )
    expect(answer.locator(".text")).to_have_text("The capital of")
    answer.get_by_role("button", name="Retry").click()
    expect(answer.locator(".text")).to_have_text(ANSWER)
    expect(answer.locator(".note")).to_be_hidden()
    expect(page.locator("article")).to_have_count(2)
    assert stage.asked[0] == stage.asked[1]


@pytest.mark.parametrize(
    ("play", "why"),
    [
        ("early", "The stream ended early."),
        ("dropped", "The connection broke."),
    ],
)
def test_a_stream_that_breaks_is_marked(stage: Stage, visit: Visit, play: str, why: str) -> None:
    answer = say(visit(stage.url), play)
    expect(answer.locator(".text")).to_have_text("The capital of")
    stage.go.set()
    expect(answer.locator(".note")).to_contain_text(f"The answer was cut off. {why}")
    expect(answer.get_by_role("button", name="Retry")).to_be_visible()
    expect(metric(answer, "tps")).to_have_text("not reported")


def test_a_stream_that_cannot_be_read_is_hung_up(stage: Stage, visit: Visit) -> None:
    answer = say(visit(stage.url), "garbled")
    expect(answer.locator(".note")).to_contain_text(
        "The answer was cut off. The gateway sent an event that can\u2019t be read."
    )
    expect(answer.locator(".text")).to_have_text("The capital of")
    assert stage.hung_up.wait(20), "the gateway goes on for nobody"


def test_an_http_error_says_why_and_only_the_last_answer_has_a_retry(
    stage: Stage, visit: Visit
) -> None:
    page = visit(stage.url)
    failed = page.locator('[data-role="assistant"]').first
    say(page, "http-500")
    expect(failed.locator(".note")).to_contain_text("The engine stopped.")
    expect(failed.get_by_role("button", name="Retry")).to_be_visible()
    expect(failed.locator(".cost")).to_be_hidden()
    say(page, "good")
    expect(failed.get_by_role("button", name="Retry")).to_be_hidden()


def test_a_locked_gateway_asks_for_the_key_and_only_this_tab_keeps_it(
    stage: Stage, visit: Visit
) -> None:
    stage.key = "sk-stage"
    page = visit(stage.url)
    settle(page, "locked")
    expect(page.locator("#status")).to_have_text("This gateway asks for an API key.")
    expect(page.get_by_label("API key")).to_be_focused()

    page.keyboard.type("sk-wrong")
    page.keyboard.press("Enter")
    expect(page.locator("#status")).to_contain_text("That key was refused.")
    expect(page.get_by_label("API key")).to_have_value("")

    page.keyboard.type("sk-stage")
    page.keyboard.press("Enter")
    expect(page.get_by_label("API key")).to_be_hidden()
    expect(say(page, "good").locator(".text")).to_have_text(ANSWER)
    kept = page.evaluate("[Object.values(sessionStorage), localStorage.length, document.cookie]")
    assert kept == [["sk-stage"], 0, ""]

    page.reload()
    settle(page)
    stage.key = "sk-newer"
    answer = say(page, "good")
    settle(page, "locked")
    expect(answer.locator(".note")).to_contain_text("Incorrect API key provided.")
    page.keyboard.type("sk-newer")
    page.keyboard.press("Enter")
    # The question that was turned away is asked again by itself.
    expect(answer.locator(".text")).to_have_text(ANSWER)


def test_a_gateway_that_is_away_can_be_tried_again(stage: Stage, visit: Visit) -> None:
    page = visit(stage.url)
    settle(page)
    page.route("**/v1/**", lambda route: route.abort())
    answer = say(page, "good")
    expect(answer.locator(".note")).to_contain_text("The gateway can\u2019t be reached.")
    page.reload()
    settle(page, "unreachable")
    expect(page.locator("#status")).to_contain_text("The gateway can\u2019t be reached.")
    expect(page.locator("#model")).to_be_disabled()
    page.keyboard.type("Patience")
    expect(page.locator("#send")).to_be_disabled()
    page.unroute("**/v1/**")
    page.locator("#retry").press("Enter")
    settle(page)
    expect(page.locator("#status")).to_have_text("")
    expect(page.locator("#send")).to_be_enabled()
    expect(page.locator("#input")).to_be_focused()


def test_a_gateway_without_a_model_and_one_that_fails(stage: Stage, visit: Visit) -> None:
    stage.models, models = [], stage.models
    page = visit(stage.url)
    settle(page, "empty")
    expect(page.locator("#status")).to_have_text("The gateway has no model to talk to.")
    stage.models_status = 503
    page.locator("#retry").click()
    settle(page, "refused")
    expect(page.locator("#status")).to_contain_text("The catalog is on fire.")
    stage.models, stage.models_status = models, 200
    page.locator("#retry").click()
    settle(page)
    expect(page.locator("#model option")).to_have_text(models)


def test_while_models_load_the_page_says_so(stage: Stage, visit: Visit) -> None:
    page = visit(stage.url)
    settle(page)
    held: list[Route] = []

    def hold(route: Route) -> None:
        held.append(route)

    page.route("**/v1/models", hold)
    page.reload()
    settle(page, "loading")
    expect(page.locator("#status")).to_have_text("Looking for models…")
    expect(page.locator("#model")).to_be_disabled()
    held[0].continue_()
    settle(page)


# ---- For every eye, ear and screen


def test_an_answer_is_announced_once_and_whole(stage: Stage, visit: Visit) -> None:
    listen = """
    window.heard = [];
    addEventListener("DOMContentLoaded", () => {
      for (const region of document.querySelectorAll("[aria-live], [role=status]")) {
        const note = () => region.textContent && heard.push(region.textContent.trim());
        new MutationObserver(note).observe(region, { childList: true, subtree: true });
      }
    });
    """
    page = visit(stage.url, script=listen)
    say(page, "good")
    settle(page)
    expect(page.locator("[data-role=assistant] [aria-live]")).to_have_count(0)
    assert page.evaluate("heard").count(ANSWER) == 1
    assert [text for text in page.evaluate("heard") if text in ANSWER] == [ANSWER]


def test_every_control_has_a_name_and_shows_its_focus(stage: Stage, visit: Visit) -> None:
    page = visit(stage.url)
    say(page, "slow")
    settle(page, "answering")
    page.keyboard.press("Escape")
    page.locator("summary").click()
    page.locator("#input").fill("Next")
    seen = set()
    for _ in range(12):
        page.keyboard.press("Tab")
        # The message field lends its outline to the box around it.
        place = page.evaluate(
            """() => {
              const at = document.activeElement;
              const name = at.id || at.className || at.localName;
              const outlined = (node) => getComputedStyle(node).outlineStyle !== "none";
              return [name, outlined(at) || (at.id === "input" && outlined(at.form))];
            }"""
        )
        if place[0] != "body":
            assert place[1], f"{place[0]} has the focus and doesn't show it"
        seen.add(place[0])
    assert {"fresh", "again", "input", "model", "summary", "temperature", "limit"} <= seen
    assert {"system", "send"} <= seen
    named = page.locator("button:visible, input:visible, select:visible, textarea:visible")
    for control in named.all():
        expect(control).to_have_accessible_name(re.compile(r"\w"))


@pytest.mark.parametrize("play", ["good", "code", "early", "http-500"])
def test_a_narrow_screen_needs_no_sideways_scroll(stage: Stage, visit: Visit, play: str) -> None:
    page = visit(stage.url, viewport={"width": 320, "height": 568})
    settle(page)
    assert page.evaluate("document.documentElement.scrollWidth") <= 320
    say(page, play, "W" * 300)
    settle(page)
    page.locator("summary").click()
    assert page.evaluate("document.documentElement.scrollWidth") <= 320
    expect(page.get_by_label("Temperature")).to_be_in_viewport(ratio=1)
    expect(page.locator("#send")).to_be_in_viewport(ratio=1)


def test_a_locked_page_fits_a_narrow_screen(stage: Stage, visit: Visit) -> None:
    stage.key = "sk-stage"
    page = visit(stage.url, viewport={"width": 320, "height": 568})
    settle(page, "locked")
    assert page.evaluate("document.documentElement.scrollWidth") <= 320
    expect(page.get_by_role("button", name="Use key")).to_be_in_viewport(ratio=1)
    page.keyboard.type("sk-wrong")
    page.keyboard.press("Enter")
    expect(page.locator("#status")).to_contain_text("That key was refused.")
    # The notice went and came back, higher: the page moved, the reader did not.
    page.evaluate("new Promise((seen) => requestAnimationFrame(() => requestAnimationFrame(seen)))")
    expect(page.locator("#latest")).to_be_hidden()


CONTRAST = """() => {
  const canvas = document.createElement("canvas").getContext("2d", { willReadFrequently: true });
  const rgb = (colour) => {
    canvas.fillStyle = colour;
    canvas.fillRect(0, 0, 1, 1);
    return canvas.getImageData(0, 0, 1, 1).data;
  };
  const light = (colour) => [...rgb(colour)].slice(0, 3).reduce((sum, part, index) => {
    const share = part / 255;
    const linear = share <= 0.04045 ? share / 12.92 : ((share + 0.055) / 1.055) ** 2.4;
    return sum + linear * [0.2126, 0.7152, 0.0722][index];
  }, 0);
  const under = (node) => {
    for (; node; node = node.parentElement) {
      const { backgroundColor } = getComputedStyle(node);
      if (backgroundColor !== "rgba(0, 0, 0, 0)") return backgroundColor;
    }
  };
  const found = {};
  for (const node of document.querySelectorAll("body *")) {
    const own = [...node.childNodes].some((child) => child.nodeType === 3 && child.data.trim());
    const inert = node.disabled || node.localName === "option" || node.localName === "noscript";
    if (!own || inert || !node.checkVisibility()) continue;
    const [a, b] = [light(getComputedStyle(node).color), light(under(node))].sort((x, y) => y - x);
    found[`${node.localName}#${node.id}.${node.className}`] = (a + 0.05) / (b + 0.05);
  }
  return found;
}"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_can_be_read_in_light_and_dark(stage: Stage, visit: Visit, scheme: str) -> None:
    page = visit(stage.url, color_scheme=scheme)
    say(page, "good")
    say(page, "http-500")
    settle(page)
    stage.key = "sk-stage"
    say(page, "code")
    settle(page, "locked")
    page.locator("#input").fill("Next")
    paper = page.evaluate("getComputedStyle(document.body).backgroundColor")
    dark = sum(map(int, re.findall(r"\d+", paper)[:3])) < 3 * 128
    assert dark == (scheme == "dark")
    contrast = page.evaluate(CONTRAST)
    assert len(contrast) > 12
    assert {name: ratio for name, ratio in contrast.items() if ratio < 4.5} == {}


def test_motion_is_left_out_when_a_person_asks_for_less(stage: Stage, visit: Visit) -> None:
    moving = """() => document.getAnimations().length"""
    for wish, few in (("reduce", True), ("no-preference", False)):
        stage.go.clear()
        page = visit(stage.url, reduced_motion=wish)
        say(page, "slow")
        settle(page, "answering")
        assert (page.evaluate(moving) == 0) == few
        stage.go.set()
        settle(page)


def test_the_end_stays_in_view_unless_the_reader_scrolls_up(stage: Stage, visit: Visit) -> None:
    page = visit(stage.url)
    answer = say(page, "long")
    expect(answer).to_contain_text("Line 59")
    expect(page.locator("#latest")).to_be_hidden()
    assert at_end(page)

    page.mouse.move(400, 300)
    page.mouse.wheel(0, -200)
    expect(page.locator("#latest")).to_be_visible()
    page.wait_for_function("was = window.was, window.was = scrollY, was === scrollY")
    before = page.evaluate("scrollY")
    stage.go.set()
    expect(answer).to_contain_text("Line 119")
    settle(page)
    assert page.evaluate("scrollY") == before

    page.locator("#latest").click()
    expect(page.locator("#latest")).to_be_hidden()
    assert at_end(page)
    expect(page.locator("#input")).to_be_focused()


def test_markup_from_script_is_refused_by_the_policy(stage: Stage, visit: Visit) -> None:
    page = visit(stage.url, wanted=".*TrustedHTML")
    refused = page.evaluate(
        "() => { try { document.body.innerHTML = 'x'; } catch (error) { return error.name; } }"
    )
    assert refused == "TypeError"


def test_a_key_with_a_foreign_letter_is_not_sent(stage: Stage, visit: Visit) -> None:
    stage.key = "sk-stage"
    page = visit(stage.url)
    settle(page, "locked")
    page.keyboard.type("sk-żółć")
    page.keyboard.press("Enter")
    assert page.locator("#key").evaluate("field => field.validity.patternMismatch")
    assert json.loads(page.evaluate("JSON.stringify({...sessionStorage})")) == {}
