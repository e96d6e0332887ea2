"""A real server on a loopback port, headless Chromium, and people who follow their links."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from rlhf_cli.flow.base import Responses
from rlhf_cli.server.embedded import EmbeddedFlow
from rlhf_cli.server.records import Vote
from rlhf_cli.server.store import Store

sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
Browser, Page = sync_api.Browser, sync_api.Page

FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
CHROMIUM = os.environ.get("RLHF_CHROMIUM") or shutil.which("chromium") or shutil.which("google-chrome")
BLIND_MS = 430
"""A little more than the time in which the page takes no answer."""
READY = "#voting:not([hidden])"


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    if CHROMIUM is None:
        pytest.skip("no Chromium found; set RLHF_CHROMIUM or install it, see tests/browser/README.md")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield browser
        browser.close()


@dataclass
class Site:
    """A server with its store, and what browsers asked of whom."""

    flow: EmbeddedFlow
    browser: Browser
    asked: list[str] = field(default_factory=list)
    dialogs: list[str] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)

    @property
    def store(self) -> Store:
        return self.flow.store

    def item(
        self,
        texts: list[str],
        prompt: str = "Why is the sky blue?",
        *,
        responses: Responses = Responses(1, 20, 20),  # noqa: B008
        settings: dict[str, object] | None = None,
    ) -> str:
        flow_id = self.store.create_flow("flow", "Which answer is better?", responses, settings=settings)
        dataset_id = self.store.create_dataset("texts")
        for i, text in enumerate(texts):
            self.store.add_datapoint(dataset_id, i, text)
        return self.store.create_item(flow_id, dataset_id, prompt, 600)

    def rater(self, name: str = "Ada") -> str:
        return self.store.tokens.add("rater", name)[0]

    def open(self, person: str, width: int = 1280, height: int = 800, ready: str = READY, **options: object) -> Page:
        """A page of `person`, who is signed in, in a browser of its own."""
        context = self.browser.new_context(viewport={"width": width, "height": height}, **options)
        context.set_default_timeout(5000)
        session = {"name": "rlhf_session", "value": self.store.tokens.open_session(person), "url": self.flow.url}
        context.add_cookies([{**session, "httpOnly": True, "sameSite": "Strict"}])
        page = context.new_page()
        self.watch(page)
        page.goto(f"{self.flow.url}{'/owner' if person.startswith('owner') else '/vote'}")
        page.wait_for_selector(ready)
        return page

    def watch(self, page: Page) -> None:
        page.on("request", lambda request: self.asked.append(request.url))
        page.on("dialog", lambda dialog: (self.dialogs.append(dialog.message), dialog.dismiss()))
        page.on("pageerror", lambda error: self.errors.append(str(error)))

    def votes(self) -> list[Vote]:
        return self.store.votes()

    def outcomes(self) -> list[str]:
        return [vote.outcome for vote in self.votes() if not vote.undone]

    def strangers(self) -> list[str]:
        """Requests that went anywhere else."""
        return [url for url in self.asked if not url.startswith((self.flow.url, "data:"))]


@pytest.fixture
def site(browser: Browser, tmp_path: Path) -> Iterator[Site]:
    with EmbeddedFlow(tmp_path / "server.sqlite") as flow:
        site = Site(flow, browser)
        yield site
        for context in browser.contexts:
            context.close()
    assert site.errors == []
    assert site.strangers() == []


@pytest.fixture
def until(site: Site) -> Callable[[Page, Callable[[], object]], None]:
    """Let the page go on until something is so; fails loudly instead of hanging."""

    def wait(page: Page, condition: Callable[[], object]) -> None:
        for _ in range(250):
            if condition():
                return
            page.wait_for_timeout(20)
        raise AssertionError("what was waited for did not happen")

    return wait
