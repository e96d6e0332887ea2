"""Whatever a model, a prompt or a name contains is text on both pages: it runs nothing, builds nothing, asks nobody."""

from __future__ import annotations

from collections.abc import Callable

from browser_world import BLIND_MS, Site
from playwright.sync_api import Page, expect

from rlhf_cli.server.markdown import TAGS, render
from rlhf_cli.text import visible

Until = Callable[[Page, Callable[[], object]], None]
ELSEWHERE = "http://elsewhere.invalid"
PAYLOADS = [
    "<script>alert(1)</script>",
    f"<script src={ELSEWHERE}/x.js></script>",
    "<img src=x onerror=alert(1)>",
    f"<img src={ELSEWHERE}/pixel.png>",
    "<svg onload=alert(1)><animate onbegin=alert(1) attributeName=x dur=1s></svg>",
    "<svg><script>alert(1)</script></svg>",
    '<a href="javascript:alert(1)">click</a>',
    f'<iframe src="{ELSEWHERE}"></iframe>',
    '<iframe srcdoc="<script>parent.alert(1)</script>"></iframe>',
    f"<link rel=stylesheet href={ELSEWHERE}/x.css>",
    "<style>* { display: none } @import url('http://elsewhere.invalid/y.css');</style>",
    f'<meta http-equiv="refresh" content="0;url={ELSEWHERE}">',
    f'<base href="{ELSEWHERE}/">',
    f'<form action="{ELSEWHERE}"><button autofocus onfocus=alert(1)>Answer 1</button></form>',
    "</textarea></title></style></script><script>alert(1)</script>",
    '"><details open ontoggle=alert(1)>',
    "' autofocus onfocus='alert(1)",
    "<math><mtext><table><mglyph><style><img src onerror=alert(1)>",
    "<!--<img src=--><img src=x onerror=alert(1)>-->",
    "<video><source onerror=alert(1)></video><object data=x></object><embed src=x>",
    f"![pixel]({ELSEWHERE}/p.png)",
    "[click me](javascript:alert(1)) [and me](data:text/html,<script>alert(1)</script>)",
    f"<{ELSEWHERE}/auto> {ELSEWHERE}/bare\n\n[r]\n\n[r]: {ELSEWHERE}/reference",
    "`</code><script>alert(1)</script>`\n\n```html\n</pre><img src=x onerror=alert(1)>\n```",
    "{{constructor.constructor('alert(1)')()}} ${alert(1)} #{7*7} <%= 7*7 %>",
    "safe\u202etxet desrever\u202c and \u2066isolate\u2069 and \u200bzero\ufeff width",
    "bell\x07 escape\x1b[31mred\x1b[0m delete\x7f next\x85 line\u2028 separator",
    "tags \U000e0041\U000e0042 and soft\xadhyphen",
    "&lt;script&gt;alert(1)&lt;/script&gt; &#x3c;img src=x onerror=alert(1)&#x3e;",
    "%3Cscript%3Ealert(1)%3C/script%3E \\u003cscript\\u003e",
]
ALL = "\n".join(PAYLOADS)
FOREIGN = (
    "script, img, svg, iframe, link, style, meta, base, form, a, video, object, embed, math, details, input, button"
)


def count(page: Page, where: str, what: str = FOREIGN) -> int:
    return int(page.locator(where).locator(what).count())


def test_hostile_prompts_and_answers_are_text_on_the_voting_page(site: Site, until: Until) -> None:
    site.item([f"{ALL} one", f"{ALL} two"], prompt=ALL)
    page = site.open(site.rater(ALL[:150]))
    assert page.evaluate("document.querySelector('#prompt').textContent") == visible(ALL)
    shown = {page.evaluate(f"document.querySelector('#{side}').textContent") for side in ("left", "right")}
    assert shown == {visible(f"{ALL} one"), visible(f"{ALL} two")}
    assert [count(page, where) for where in ("#prompt", "#left", "#right")] == [0, 0, 0]
    assert page.locator("head script").count() == 1
    expect(page.get_by_role("button", name="Answer 1")).to_be_visible()
    page.wait_for_timeout(BLIND_MS)
    page.keyboard.press("1")
    until(page, site.votes)
    assert site.dialogs == []
    assert page.url == f"{site.flow.url}/vote"


def test_hostile_markdown_keeps_its_structure_and_nothing_else(site: Site) -> None:
    flags = [{"key": "use_main_text_markdown", "value": "true"}]
    text = f"**bold** and\n\n- a list\n\n{ALL}"
    site.item([text, text + " two"], settings={"featureFlags": flags})
    page = site.open(site.rater())
    assert page.locator("#left strong").first.inner_text() == "bold"
    assert page.locator("#left li").count() >= 1
    tags = page.evaluate(
        "[...document.querySelectorAll('#left *')].map((e) => [e.tagName.toLowerCase(), e.attributes.length])"
    )
    assert {tag for tag, _ in tags} <= TAGS
    assert {attributes for _, attributes in tags} == {0}
    assert site.dialogs == []


def test_each_payload_alone_is_text_in_both_ways_of_showing_it(site: Site) -> None:
    site.item(["one", "two"])
    page = site.open(site.rater())
    found = page.evaluate(
        """async (texts) => {
          const { showText, showMarkdown, visible } = await import("/pages/text.js");
          return texts.map(([text, html]) => {
            const [plain, rich] = [document.createElement("div"), document.createElement("div")];
            document.body.append(plain, rich);
            showText(plain, text);
            showMarkdown(rich, html);
            const tags = (e) => [...e.querySelectorAll("*")].map((x) => x.tagName.toLowerCase());
            return [plain.textContent, visible(text), tags(plain), tags(rich)];
          });
        }""",
        [[payload, render(payload)] for payload in PAYLOADS],
    )
    for payload, (shown, named, plain, rich) in zip(PAYLOADS, found, strict=True):
        assert shown == named == visible(payload)
        assert set(plain) <= {"span"}
        assert set(rich) <= TAGS
    page.wait_for_timeout(100)
    assert site.dialogs == []


def test_even_html_that_no_renderer_cleaned_builds_no_foreign_element(site: Site) -> None:
    site.item(["one", "two"])
    page = site.open(site.rater())
    tags = page.evaluate(
        """async (texts) => {
          const { showMarkdown } = await import("/pages/text.js");
          return texts.flatMap((html) => {
            const rich = document.createElement("div");
            document.body.append(rich);
            showMarkdown(rich, html);
            return [...rich.querySelectorAll("*")].map((x) => [x.tagName.toLowerCase(), x.attributes.length]);
          });
        }""",
        PAYLOADS,
    )
    assert {tag for tag, _ in tags} <= TAGS
    assert all(attributes == 0 for _, attributes in tags)
    page.wait_for_timeout(100)
    assert site.dialogs == []


def test_the_page_and_the_terminal_call_the_same_characters_hidden(site: Site) -> None:
    site.item(["one", "two"])
    page = site.open(site.rater())
    named = page.evaluate(
        """async () => {
          const { visible } = await import("/pages/text.js");
          const named = [];
          for (let code = 0; code < 0x110000; code++) {
            const character = String.fromCodePoint(code);
            if (visible(character) !== character) named.push([code, visible(character)]);
          }
          return named;
        }"""
    )
    assert named == [[code, visible(chr(code))] for code in range(0x110000) if visible(chr(code)) != chr(code)]


def test_hostile_prompts_answers_and_names_are_text_on_the_owners_page(site: Site) -> None:
    item_id = site.item([f"{ALL} one", f"{ALL} two"], prompt=ALL)
    rater_id = site.rater(ALL[:400])
    pair = site.store.lease(rater_id)
    assert pair is not None
    site.store.vote(pair.id, rater_id, "left", 50)
    owner = site.store.tokens.add("owner", "the owner")[0]
    page = site.open(owner, ready="#board:not([hidden])")
    page.locator("#items button").first.click()
    page.wait_for_selector("#group:not([hidden])")
    texts = page.evaluate("[...document.querySelectorAll('#group .text')].map((e) => e.textContent)")
    assert visible(ALL) in texts
    assert {visible(f"{ALL} one"), visible(f"{ALL} two")} <= set(texts)
    assert "<script>alert(1)</script>" in page.inner_text("#raters")
    assert count(page, "#raters") == 0
    foreign = "script, img, iframe, link, style, meta, base, form, a, video, object, embed, math, input, button"
    assert count(page, "#group", foreign) == 0
    assert page.locator("head script").count() == 1
    assert site.dialogs == []
    assert site.store.item(item_id).votes == 1


def test_a_picture_comes_from_our_own_store_or_not_at_all(site: Site) -> None:
    site.item(["one", "two"])
    page = site.open(site.rater())
    paths = [
        f"{ELSEWHERE}/a.png",
        "//elsewhere.invalid/a.png",
        "/media/../session",
        "javascript:alert(1)",
        "/media/" + "g" * 64,
    ]
    tags = page.evaluate(
        """async (paths) => {
          const { showImage } = await import("/pages/text.js");
          return paths.map((path) => {
            const holder = document.createElement("div");
            showImage(holder, path, "x");
            return holder.children.length;
          });
        }""",
        paths,
    )
    assert tags == [0] * len(paths)
