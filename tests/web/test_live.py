"""The page in front of the real gateway and a real, small model."""

import re
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
from playwright.sync_api import Page, expect

pytestmark = [pytest.mark.browser, pytest.mark.engine]

# Keeps every text the answer has had.
WATCH = """
window.seen = [];
new MutationObserver(() => {
  const text = document.querySelector('[data-role="assistant"] .text')?.textContent;
  if (text && text !== seen.at(-1)) seen.push(text);
}).observe(document, { subtree: true, childList: true, characterData: true });
"""


def test_a_question_is_answered_and_its_cost_is_shown(
    live_gateway: Any, visit: Callable[..., Page]
) -> None:
    page = visit(live_gateway.url, script=WATCH)
    expect(page.locator("body")).to_have_attribute("data-state", "ready")
    expect(page.locator("#model")).not_to_have_value("")

    # Without chance: a model of this size says anything when its words are drawn.
    page.locator("summary").press("Enter")
    page.get_by_label("Temperature").fill("0")
    page.get_by_label("Temperature").press("Escape")
    page.locator("#input").fill("What is the capital of France? Answer in one sentence.")
    page.locator("#input").press("Enter")

    answer = page.locator('[data-role="assistant"]')
    # A small machine may take its time; the limit only ends a test that hangs.
    expect(answer.locator(".text")).to_have_text(re.compile(r"\w"), timeout=120_000)
    expect(answer).to_have_attribute("aria-busy", "false", timeout=120_000)
    expect(answer.locator(".text")).to_contain_text("Paris")
    expect(answer.locator(".note")).to_be_hidden()
    expect(answer.locator('[data-metric="ttft"]')).to_have_text(re.compile(r"^[\d,]+ ms$"))
    expect(answer.locator('[data-metric="tps"]')).to_have_text(re.compile(r"^[\d,.]+ tokens/s$"))
    expect(answer.locator('[data-metric="tokens"]')).to_have_text(re.compile(r"^\d+ in, \d+ out$"))
    # A speed is shown only where the text came in more than one read; each sight of it grew.
    seen = page.evaluate("seen")
    assert all(after.startswith(before) for before, after in pairwise(seen))
    expect(answer.locator(".text")).to_have_text(seen[-1])
    expect(page.locator("#input")).to_be_focused()
