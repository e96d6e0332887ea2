"""The owner's page: what it shows is what the store knows, it renews itself, and it is for owners alone."""

from __future__ import annotations

import pytest
from browser_world import Site
from playwright.sync_api import expect

BOARD = "#board:not([hidden])"
SIGNED_OUT = "#rest-link:not([hidden])"


def test_figures_follow_the_votes_without_a_reload(site: Site) -> None:
    site.item(["one", "two", "three"], prompt="Why?")
    page = site.open(site.store.tokens.add("owner", "me")[0], ready=BOARD)
    counted = page.locator(".tile", has_text="votes that count").locator("b")
    expect(counted).to_have_text("0")
    row = page.locator("#items tr").first
    page.evaluate("window.sameRow = document.querySelector('#items tr')")
    for name in ("Ada", "Grace"):
        rater_id = site.rater(name)
        pair = site.store.lease(rater_id)
        assert pair is not None
        site.store.vote(pair.id, rater_id, "left", 4000)
    expect(counted).to_have_text("2")
    expect(row).to_contain_text("2 of 20")
    assert page.evaluate("window.sameRow === document.querySelector('#items tr')")  # renewed in place, no flicker
    expect(page.locator("#raters tr")).to_have_count(2)
    page.get_by_role("button", name="Why?").click()
    expect(page.locator("#group .rank")).to_have_count(3)


@pytest.mark.parametrize("width", [360, 1280])
def test_the_page_fits_its_width(site: Site, width: int) -> None:
    site.item(["A long answer. " * 100, "Unbroken" * 60], prompt="A long prompt. " * 60)
    page = site.open(site.store.tokens.add("owner", "me")[0], width, 740, ready=BOARD)
    page.locator("#items button").first.click()
    page.wait_for_selector("#group:not([hidden])")
    assert page.evaluate("document.documentElement.scrollWidth") <= width


def test_an_owner_signs_in_with_a_secret_and_out_again(site: Site) -> None:
    _, secret = site.store.tokens.add("owner", "me")
    page = site.browser.new_context().new_page()
    site.watch(page)
    page.goto(f"{site.flow.url}/login")
    page.get_by_label("Secret").fill("wrong")
    page.get_by_role("button", name="Sign in").click()
    expect(page.get_by_role("status")).to_contain_text("not right")
    page.get_by_label("Secret").fill(secret)
    page.get_by_role("button", name="Sign in").click()
    page.wait_for_selector(BOARD)
    assert secret not in page.url
    page.get_by_role("button", name="Sign out").click()
    expect(page.get_by_text("Signed out")).to_be_visible()
    page.reload()
    expect(page.get_by_text("Not signed in")).to_be_visible()


def test_a_rater_sees_no_results(site: Site) -> None:
    site.item(["one", "two"])
    page = site.open(site.rater())
    page.goto(f"{site.flow.url}/owner")
    page.wait_for_selector(SIGNED_OUT)
    expect(page.locator("#board")).to_be_hidden()


def test_a_link_works_in_one_browser(site: Site) -> None:
    link = f"{site.flow.url}/join/{site.store.tokens.add_link(site.rater())}"
    for expected in ("/vote", "/join"):
        page = site.browser.new_context().new_page()
        site.watch(page)
        page.goto(link)
        assert page.url == f"{site.flow.url}/join"
        page.get_by_role("button", name="Start").click()
        page.wait_for_timeout(300)
        assert page.url == f"{site.flow.url}{expected}"
    expect(page.get_by_role("status")).to_contain_text("used before")
