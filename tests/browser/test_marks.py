"""Marking what is good or bad inside an answer, by mouse, touch and keyboard; a vote needs none of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from browser_world import BLIND_MS, Site
from playwright.sync_api import Page, expect

from rlhf_cli.text import visible

Until = Callable[[Page, Callable[[], object]], None]
TEXTS = ["Sunlight scatters in the air. Blue most of all.", "Because the sea is blue. It mirrors."]
MARKED = {"markSegments": True}
ODD = "safe \u202etxet\u202c <b>bold</b> and \U0001f600 \u200bend"


@pytest.fixture
def page(site: Site) -> Page:
    site.item(TEXTS, settings=MARKED)
    return site.open(site.rater())


def span_of(page: Page, side: str, words: str) -> dict[str, Any]:
    """Where on the screen the words of an answer begin and end."""
    return page.evaluate(  # type: ignore[no-any-return]
        """([side, words]) => {
          const walker = document.createTreeWalker(document.getElementById(side), NodeFilter.SHOW_TEXT);
          for (let node = walker.nextNode(); node; node = walker.nextNode()) {
            const at = node.data.indexOf(words);
            if (at < 0) continue;
            const range = document.createRange();
            range.setStart(node, at); range.setEnd(node, at + words.length);
            const [first, last] = [range.getClientRects()[0], [...range.getClientRects()].pop()];
            return { x1: first.left, y1: first.top + first.height / 2, x2: last.right, y2: last.top + last.height / 2 };
          }
          return null;
        }""",
        [side, words],
    )


def drag(page: Page, side: str, words: str) -> None:
    """Select words as a mouse does."""
    at = span_of(page, side, words)
    page.mouse.move(at["x1"] + 0.5, at["y1"])
    page.mouse.down()
    page.mouse.move(at["x2"] - 0.5, at["y2"], steps=4)
    page.mouse.up()


def marked(page: Page) -> list[tuple[str, str]]:
    found = page.evaluate("[...document.querySelectorAll('#pair mark')].map((m) => [m.className, m.textContent])")
    return [(kind, text) for kind, text in found]


def press(page: Page, *keys: str) -> None:
    for key in keys:
        page.keyboard.press(key)


def vote(page: Page, key: str = "1") -> None:
    page.wait_for_timeout(BLIND_MS)
    page.keyboard.press(key)


def words_of(site: Site) -> set[tuple[str, bool]]:
    """What the votes that stand say was marked, read from the texts by the places that were stored."""
    candidates = site.store.candidates(site.votes()[0].item_id)
    segments = [segment for vote in site.votes() if vote.counts for segment in vote.segments]
    return {(candidates[s.completion].text[s.start : s.end], s.good) for s in segments}


def test_words_selected_with_the_mouse_are_marked_and_stored_with_the_vote(
    site: Site, page: Page, until: Until
) -> None:
    left, right = page.inner_text("#left"), page.inner_text("#right")
    drag(page, "left", left.split()[2])
    page.get_by_role("button", name="Good", exact=True).click()
    drag(page, "right", right.split()[1])
    press(page, "x")
    assert marked(page) == [("liked", left.split()[2]), ("disliked", right.split()[1])]
    vote(page)
    until(page, site.votes)
    assert words_of(site) == {(left.split()[2], True), (right.split()[1], False)}
    assert [TEXTS[s.completion] for s in site.votes()[0].segments] == [left, right]


def test_a_vote_without_marks_is_a_whole_vote(site: Site, page: Page, until: Until) -> None:
    vote(page, "2")
    until(page, site.votes)
    assert site.outcomes() == ["right"]
    assert site.votes()[0].segments == ()


def test_nothing_can_be_marked_where_the_flow_does_not_ask_for_it(site: Site, until: Until) -> None:
    site.item(TEXTS)
    page = site.open(site.rater())
    expect(page.locator("#marking")).to_be_hidden()
    drag(page, "left", page.inner_text("#left").split()[0])
    press(page, "g", "m")
    assert marked(page) == []
    vote(page)
    until(page, site.votes)
    assert site.votes()[0].segments == ()


def test_everything_can_be_done_with_the_keyboard_alone(site: Site, page: Page, until: Until) -> None:
    left, right = page.inner_text("#left"), page.inner_text("#right")
    words = left.replace(".", "").split()
    press(page, "m", "ArrowRight", "Shift+ArrowRight", "g")
    assert marked(page) == [("liked", f"{words[1]} {words[2]}")]
    press(page, "ArrowLeft", "x", "m", "ArrowUp", "ArrowDown", "g")
    first = left.split()[0]
    assert marked(page)[0] == ("disliked", first)
    assert marked(page)[-1][1] in right.replace(". ", ".|").split("|")
    press(page, "Escape")
    vote(page, "ArrowRight")  # arrows vote again
    until(page, site.votes)
    assert site.outcomes() == ["right"]
    assert (first, False) in words_of(site)


def test_undo_takes_marks_back_first_and_then_the_vote_whose_marks_come_back_with_it(
    site: Site, page: Page, until: Until
) -> None:
    words = page.inner_text("#left").split()
    drag(page, "left", words[0])
    press(page, "g")
    drag(page, "left", words[1])
    press(page, "x", "u")
    assert marked(page) == [("liked", words[0])]
    vote(page)
    until(page, site.votes)
    page.wait_for_timeout(BLIND_MS)
    press(page, "u")
    expect(page.locator("#status")).to_have_text("Taken back. Vote again.")
    assert marked(page) == [("liked", words[0])]
    drag(page, "left", words[0])
    press(page, "x")
    vote(page)
    until(page, lambda: len(site.votes()) == 2)
    assert words_of(site) == {(words[0], False)}


def test_a_mark_can_be_changed_and_removed(page: Page) -> None:
    words = page.inner_text("#left").split()
    drag(page, "left", " ".join(words[:3]))
    press(page, "g")
    drag(page, "left", f" {words[1]} ")
    press(page, "x")
    assert marked(page) == [("liked", f"{words[0]} "), ("disliked", words[1]), ("liked", f" {words[2]}")]
    page.locator("#left mark").nth(1).click()
    press(page, "Delete")
    assert marked(page) == [("liked", f"{words[0]} "), ("liked", f" {words[2]}")]


def test_marks_survive_a_reload(site: Site, page: Page, until: Until) -> None:
    word = page.inner_text("#right").split()[0]
    drag(page, "right", word)
    press(page, "g")
    page.reload()
    page.wait_for_selector("#pair mark")
    assert marked(page) == [("liked", word)]
    vote(page)
    until(page, site.votes)
    assert words_of(site) == {(word, True)}


def test_a_selection_over_both_answers_marks_the_one_it_began_in(page: Page) -> None:
    left = page.inner_text("#left")
    start, end = span_of(page, "left", left.split()[1]), span_of(page, "right", page.inner_text("#right").split()[1])
    page.mouse.move(start["x1"] + 0.5, start["y1"])
    page.mouse.down()
    page.mouse.move(end["x2"], end["y2"], steps=6)
    page.mouse.up()
    press(page, "g")
    assert marked(page) == [("liked", left.split(maxsplit=1)[1])]


def test_places_are_those_of_the_text_as_it_was_sent_whatever_is_in_it(site: Site, until: Until) -> None:
    texts = [f"one {ODD}", f"two {ODD}"]
    site.item(texts, settings=MARKED)
    page = site.open(site.rater())
    assert page.inner_text("#left") in [visible(text) for text in texts]
    drag(page, "left", "bold</b> and \U0001f600")
    press(page, "g")
    drag(page, "right", "<U+202E>")
    press(page, "x")
    drag(page, "right", "end")
    press(page, "x")
    assert page.locator("#pair b").count() == 0
    vote(page)
    until(page, site.votes)
    assert words_of(site) == {("bold</b> and \U0001f600", True), ("\u202e", False), ("end", False)}


def test_what_a_finger_selected_is_marked_by_taps_on_a_phone(site: Site, until: Until) -> None:
    site.item(TEXTS, settings=MARKED)
    page = site.open(site.rater(), 360, 740, has_touch=True, is_mobile=True)
    word = page.inner_text("#left").split()[1]
    # Headless Chromium selects nothing on a long press, so the selection itself is made here.
    page.evaluate(
        """(word) => {
          const text = document.getElementById('left').firstChild, at = text.data.indexOf(word);
          getSelection().setBaseAndExtent(text, at, text, at + word.length);
        }""",
        word,
    )
    expect(page.locator("#picked")).to_have_text(f"\u201c{word}\u201d")
    page.get_by_role("button", name="Good", exact=True).tap()
    assert marked(page) == [("liked", word)]
    page.locator("#pair mark").tap()
    page.get_by_role("button", name="Bad", exact=True).tap()
    assert marked(page) == [("disliked", word)]
    page.wait_for_timeout(BLIND_MS)
    page.get_by_role("button", name="Answer 2").tap()
    until(page, site.votes)
    assert words_of(site) == {(word, False)}


def test_browsers_that_cannot_tell_words_apart_go_by_blanks(site: Site, page: Page) -> None:
    page.add_init_script("delete Intl.Segmenter")
    page.reload()
    page.wait_for_selector("#voting:not([hidden])")
    words = page.inner_text("#left").split()
    press(page, "m", "ArrowRight", "g", "ArrowDown", "x")
    assert marked(page)[0] == ("liked", words[1])
    assert marked(page)[1][1] in page.inner_text("#left").replace(". ", ".|").split("|")
