"""The voting page, as a person uses it."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from browser_world import BLIND_MS, READY, Site
from playwright.sync_api import Page, expect

from rlhf_cli.server import gold

Until = Callable[[Page, Callable[[], object]], None]
TEXTS = [f"Text number {i}." for i in range(8)]


@pytest.fixture
def page(site: Site) -> Page:
    site.item(TEXTS)
    return site.open(site.rater())


def press(page: Page, key: str) -> None:
    """As a person does, who has looked at the pair first."""
    page.wait_for_timeout(BLIND_MS)
    page.keyboard.press(key)


def click(page: Page, name: str) -> None:
    page.wait_for_timeout(BLIND_MS)
    page.get_by_role("button", name=name).click()


def preloaded(page: Page) -> None:
    """Wait until the next pair is there too."""
    page.wait_for_function("JSON.parse(sessionStorage['rlhf.pairs'] ?? '{}').pairs?.length === 2")


def test_every_key_gives_its_answer(site: Site, page: Page, until: Until) -> None:
    for key in ("1", "ArrowLeft", "2", "ArrowRight", "0", "ArrowDown", "b", "s"):
        press(page, key)
    until(page, lambda: len(site.votes()) == 8)
    assert site.outcomes() == ["left", "left", "right", "right", "tie", "tie", "both_bad", "skip"]
    expect(page.locator("#progress")).to_have_text("7 today, 1 open")


def test_what_is_voted_for_is_what_was_shown(site: Site, page: Page, until: Until) -> None:
    shown = [page.inner_text("#left"), page.inner_text("#right")]
    click(page, "Answer 2")
    until(page, site.votes)
    (vote,) = site.votes()
    assert [TEXTS[vote.left], TEXTS[vote.right]] == shown
    assert vote.outcome == "right"
    assert vote.response_ms is not None
    assert vote.response_ms >= BLIND_MS


def test_every_button_gives_its_answer_on_a_phone(site: Site, until: Until) -> None:
    site.item(TEXTS)
    page = site.open(site.rater(), 360, 740, has_touch=True, is_mobile=True)
    for name in ("Answer 1", "Answer 2", "Equal", "Both bad", "Skip"):
        page.wait_for_timeout(BLIND_MS)
        page.get_by_role("button", name=name).tap()
    until(page, lambda: len(site.votes()) == 5)
    assert site.outcomes() == ["left", "right", "tie", "both_bad", "skip"]


def test_a_double_click_counts_once(site: Site, page: Page, until: Until) -> None:
    page.wait_for_timeout(BLIND_MS)
    page.get_by_role("button", name="Answer 1").dblclick()
    until(page, site.votes)
    page.wait_for_timeout(BLIND_MS)
    assert site.outcomes() == ["left"]


def test_keys_pressed_right_after_a_pair_appears_are_ignored(site: Site, page: Page, until: Until) -> None:
    press(page, "1")
    for _ in range(4):
        page.keyboard.press("1")
    until(page, site.votes)
    page.wait_for_timeout(100)
    assert site.outcomes() == ["left"]


def test_the_next_pair_is_there_before_it_is_asked_for(site: Site, page: Page, until: Until) -> None:
    preloaded(page)
    before = page.inner_text("#pair")
    page.context.set_offline(True)
    press(page, "1")
    assert page.inner_text("#pair") != before


def test_undo_shows_the_same_pair_again_and_keeps_a_record(site: Site, page: Page, until: Until) -> None:
    before = page.inner_text("#pair")
    press(page, "1")
    until(page, site.votes)
    press(page, "Backspace")
    expect(page.locator("#status")).to_have_text("Taken back. Vote again.")
    assert page.inner_text("#pair") == before
    press(page, "2")
    until(page, lambda: len(site.votes()) == 2)
    assert [(vote.outcome, vote.undone) for vote in site.votes()] == [("left", True), ("right", False)]
    assert [vote.late for vote in site.votes()] == [False, False]
    press(page, "1")  # the pair that undo had put aside
    until(page, lambda: len(site.votes()) == 3)
    assert not site.votes()[-1].late


def test_there_is_nothing_to_undo_before_the_first_vote(page: Page) -> None:
    expect(page.get_by_role("button", name="Undo")).to_be_disabled()


def test_a_reload_in_mid_vote_shows_the_same_pair(site: Site, page: Page, until: Until) -> None:
    before = page.inner_text("#pair")
    page.reload()
    page.wait_for_selector(READY)
    assert page.inner_text("#pair") == before
    press(page, "1")
    until(page, site.votes)
    assert [vote.late for vote in site.votes()] == [False]


def test_a_vote_that_was_not_acknowledged_is_sent_after_a_reload(site: Site, page: Page, until: Until) -> None:
    page.route("**/vote/*", lambda route: route.abort() if route.request.method == "POST" else route.fallback())
    press(page, "2")
    expect(page.locator("#status")).to_have_text("Offline, 1 vote waiting")
    assert site.votes() == []
    page.unroute("**/vote/*")
    page.reload()
    until(page, site.votes)
    assert site.outcomes() == ["right"]
    assert page.evaluate("Object.keys(localStorage).filter((key) => key.startsWith('rlhf.vote.'))") == []


def test_a_vote_whose_acknowledgement_was_lost_counts_once(site: Site, page: Page, until: Until) -> None:
    lost = []

    def lose(route: object) -> None:
        if "lease" in route.request.url or lost:  # type: ignore[attr-defined]
            return route.fallback()  # type: ignore[attr-defined]
        lost.append(route.fetch())  # type: ignore[attr-defined]
        return route.abort()  # type: ignore[attr-defined]

    page.route("**/vote/*", lose)
    press(page, "1")
    until(page, lambda: lost)
    page.evaluate("window.dispatchEvent(new Event('online'))")
    until(page, lambda: not page.evaluate("Object.keys(localStorage).some((key) => key.startsWith('rlhf.vote.'))"))
    assert site.outcomes() == ["left"]


def test_votes_wait_while_offline_and_are_sent_when_back(site: Site, page: Page, until: Until) -> None:
    preloaded(page)
    page.context.set_offline(True)
    press(page, "1")
    press(page, "2")
    expect(page.locator("#status")).to_have_text("Offline, 2 votes waiting")
    page.context.set_offline(False)
    until(page, lambda: len(site.votes()) == 2)
    assert site.outcomes() == ["left", "right"]
    expect(page.locator(READY)).to_be_visible()


def test_a_vote_that_still_waits_is_undone_without_a_trace(site: Site, page: Page, until: Until) -> None:
    preloaded(page)
    before = page.inner_text("#pair")
    page.context.set_offline(True)
    press(page, "1")
    press(page, "u")
    assert page.inner_text("#pair") == before
    page.context.set_offline(False)
    press(page, "2")
    until(page, site.votes)
    assert site.outcomes() == ["right"]


def test_a_page_that_comes_back_after_its_time_says_so_and_fetches_another_pair(site: Site, until: Until) -> None:
    site.store.lease_s = 1.0
    site.item(TEXTS)
    page = site.open(site.rater())
    before = page.inner_text("#pair")
    site.store.lease_s = 60.0
    expect(page.locator("#status")).to_contain_text("went back after its time")
    assert page.inner_text("#pair") != before
    press(page, "1")
    until(page, site.votes)
    assert [vote.late for vote in site.votes()] == [False]


def test_a_vote_that_comes_too_late_is_kept_and_said_to_be_late(site: Site, page: Page, until: Until) -> None:
    (flow,) = site.store.flows("", 0, 1, newest_first=True)[1]
    (item,) = site.store.items(flow.id, 0, 1, newest_first=True)[1]
    site.store.stop(item.id)
    press(page, "1")
    until(page, site.votes)
    expect(page.locator("#status")).to_contain_text("does not count")
    assert site.votes()[0].late


def test_the_newest_of_two_tabs_goes_on_and_the_other_one_says_so(site: Site, page: Page, until: Until) -> None:
    other = page.context.new_page()
    site.watch(other)
    other.goto(f"{site.flow.url}/vote")
    other.wait_for_selector(READY)
    expect(page.get_by_role("heading", name="Voting goes on in another tab")).to_be_visible()
    press(page, "1")
    press(other, "2")
    until(other, site.votes)
    assert site.outcomes() == ["right"]
    page.get_by_role("button", name="Vote here").click()
    page.wait_for_selector(READY)
    expect(other.get_by_role("heading", name="Voting goes on in another tab")).to_be_visible()


def test_new_pairs_appear_by_themselves(site: Site) -> None:
    page = site.open(site.rater(), ready="#rest-title:has-text('Nothing to vote on')")
    site.item(TEXTS)
    expect(page.locator(READY)).to_be_visible()


def test_a_revoked_rater_is_told_and_loses_no_waiting_vote(site: Site, page: Page) -> None:
    rater_id = next(token.id for token in site.store.tokens.all() if token.role == "rater")
    site.store.tokens.revoke(rater_id)
    press(page, "1")
    expect(page.get_by_role("heading", name="You are not signed in")).to_be_visible()
    assert page.evaluate("Object.keys(localStorage).some((key) => key.startsWith('rlhf.vote.'))")


def test_gold_pairs_look_like_any_other(site: Site, until: Until, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gold, "SHARE", 1.0)
    site.item(TEXTS)
    flow_id = site.store.flows("", 0, 1, newest_first=True)[1][0].id
    gold.set_pairs(site.store, flow_id, [gold.GoldPair("Is 4 even?", "Yes.", "No.")])
    rater_id = site.rater()
    page = site.open(rater_id)
    assert page.inner_text("#prompt") == "Is 4 even?"
    assert "gold" not in page.content().lower()
    press(page, "1" if page.inner_text("#left") == "Yes." else "2")
    until(page, lambda: gold.accuracy(site.store))
    assert gold.accuracy(site.store)[rater_id] == (1, 1)
    press(page, "1")
    until(page, site.votes)  # an ordinary pair again


@pytest.mark.parametrize("width", [360, 1280])
def test_the_page_fits_its_width_and_answers_stay_in_reach(site: Site, width: int) -> None:
    site.item(["A long answer. " * 200, "Unbrokenwords" * 40], prompt="A long prompt. " * 120)
    page = site.open(site.rater(), width, 740)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    for name in ("Answer 1", "Answer 2", "Equal", "Both bad", "Skip"):
        box = page.get_by_role("button", name=name).bounding_box()
        assert box is not None
        assert box["height"] >= 44
        assert box["y"] + box["height"] <= 740
    left, right = (page.locator(f"#pair article >> nth={i}").bounding_box() for i in (0, 1))
    assert left is not None
    assert right is not None
    assert left["width"] == pytest.approx(right["width"], abs=1)
    assert (left["y"] == right["y"]) == (width == 1280)
    page.evaluate("window.scrollTo(0, 10000)")
    assert page.locator("#prompt").bounding_box()["y"] >= 0  # type: ignore[index]


def test_show_more_unfolds_both_sides_at_once(site: Site) -> None:
    site.item(["A long answer.\n" * 80, "A longer answer.\n" * 90])
    page = site.open(site.rater())
    folded = [page.locator(side).bounding_box()["height"] for side in ("#left", "#right")]  # type: ignore[index]
    assert folded[0] == folded[1]
    page.get_by_role("button", name="Show more of both").click()
    assert page.get_by_role("button", name="Show less of both").get_attribute("aria-expanded") == "true"
    for side in ("#left", "#right"):
        assert (
            page.evaluate(
                "(s) => { const e = document.querySelector(s); return e.scrollHeight - e.clientHeight; }", side
            )
            <= 1
        )


def test_large_text_in_a_narrow_window_stays_usable(site: Site, until: Until) -> None:
    site.item(["A long answer. " * 60, "Short."])
    page = site.open(site.rater(), 360, 740)
    page.evaluate("document.documentElement.style.fontSize = '200%'")
    page.evaluate("window.dispatchEvent(new Event('resize'))")
    assert page.evaluate("document.documentElement.scrollWidth") <= 360
    click(page, "Answer 2")
    until(page, site.votes)


def test_the_keyboard_alone_reaches_every_button_in_the_order_one_sees(page: Page) -> None:
    reached = []
    for _ in range(8):
        page.keyboard.press("Tab")
        reached.append(page.evaluate("document.activeElement.dataset.act ?? document.activeElement.id"))
        outline = page.evaluate("getComputedStyle(document.activeElement).outlineStyle")
        assert outline == "solid" or reached[-1] == ""
    assert reached[:6] == ["help-open", "left", "right", "tie", "both_bad", "skip"]


def test_help_opens_with_its_key_and_takes_the_keys(site: Site, page: Page) -> None:
    page.keyboard.press("?")
    expect(page.get_by_role("dialog")).to_be_visible()
    press(page, "1")
    assert site.votes() == []
    page.keyboard.press("Escape")
    expect(page.get_by_role("dialog")).to_be_hidden()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_every_text_has_contrast_enough(site: Site, scheme: str) -> None:
    site.item(TEXTS)
    page = site.open(site.rater(), color_scheme=scheme)
    low = page.evaluate(CONTRAST)
    assert low == []


CONTRAST = """() => {
  const parse = (colour) => { const n = colour.match(/[\\d.]+/g).map(Number); return n.length === 3 ? [...n, 1] : n; };
  const linear = (v) => (v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
  const light = ([r, g, b]) => 0.2126 * linear(r / 255) + 0.7152 * linear(g / 255) + 0.0722 * linear(b / 255);
  const behind = (e) => {
    for (; e; e = e.parentElement) {
      const colour = parse(getComputedStyle(e).backgroundColor);
      if (colour[3] > 0) return colour;
    }
    return [255, 255, 255, 1];
  };
  const low = [];
  for (const e of document.querySelectorAll("body *")) {
    const own = [...e.childNodes].some((n) => n.nodeType === 3 && n.textContent.trim());
    if (!own || !e.checkVisibility() || e.closest(":disabled")) continue;
    const [a, b] = [light(parse(getComputedStyle(e).color)), light(behind(e))].sort((x, y) => y - x);
    const ratio = (a + 0.05) / (b + 0.05);
    if (ratio < 4.5) low.push(`${e.tagName} ${e.textContent.trim().slice(0, 20)} ${ratio.toFixed(2)}`);
  }
  return low;
}"""
