"""The dashboard in a real Chromium."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from tests.browser.chromium import chromium, new_page
from tests.browser.network import Said, seen, status, usage
from tests.e2e.test_routing import member
from tests.harness import Lab

LONG = "sao-paulo-office-tower-north-floor-17-gateway-a"
SAID: Said = {
    ("berlin", "berlin-1"): status(
        {"acme/llm": usage(90 * 10**9, 6 * 10**9, errors=2), "(private)": usage(10**9, 10**8)}
    ),
    ("berlin", "berlin-2"): status({"acme/llm": usage(60 * 10**9, 0)}),
    ("lagos", "lagos-1"): status(
        {"acme/<img src=x onerror=alert(1)>": usage(1, 1), "acme/vision": usage(3 * 10**9, 10**9)},
        errors=[{"time": 1, "level": "error", "count": 3, "event": "<b>a source failed</b>", "code": "busy"}],
    ),
    ("sao-paulo-metropolitan-region", LONG): b"no status at all",
}
CONTRAST = """[...document.querySelectorAll("main *, header *, footer *")].filter(e => e.checkVisibility() &&
    [...e.childNodes].some(n => n.nodeType == 3 && n.textContent.trim())).map(e => {
  const lum = c => { const [r, g, b] = c.match(/[\\d.]+/g).map(v => v / 255).map(v =>
      v <= .04045 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4); return .2126 * r + .7152 * g + .0722 * b; };
  const clear = e => /, 0\\)|transparent/.test(getComputedStyle(e).backgroundColor);
  let back = e; while (back && clear(back)) back = back.parentElement;
  const [a, b] = [lum(getComputedStyle(e).color), lum(getComputedStyle(back ?? document.body).backgroundColor)];
  return [(Math.max(a, b) + .05) / (Math.min(a, b) + .05), e.textContent.slice(0, 40)];
}).filter(([ratio]) => ratio < 4.5)"""
"""Texts that are harder to read than WCAG 2.2 (1.4.3) lets them be."""
UNNAMED = """[...document.querySelectorAll("a, button, input, select, [role=img]")].filter(e => e.checkVisibility() &&
    !(e.getAttribute("aria-label") || e.textContent.trim() || e.labels?.[0]?.textContent.trim()))
    .map(e => e.outerHTML)"""
ROWS = '[...document.querySelectorAll("#nodes tbody tr:not(.region) .name")].map(e => e.textContent)'


@pytest.fixture(scope="module")
def browser(need: Callable[[str], str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """One for all tests; each has pages of its own."""
    with chromium(need("chromium"), tmp_path_factory.mktemp("chromium")) as driven:
        yield driven


async def test_the_network_is_shown_and_used_by_keyboard(lab: Lab, browser: str) -> None:
    async with seen(lab, SAID) as net, new_page(browser) as page:
        await page.open(net.router.url)
        assert await page.eval(ROWS) == ["berlin-1", "berlin-2", "lagos-1", LONG]
        total = (await page.eval('document.getElementById("total").innerText')).replace("\xa0", " ").split("\n")
        assert {"4 of 4", "154 GB", "7.1 GB", "147 GB", "90%"} <= set(total)
        models = await page.eval('document.getElementById("models").innerText')
        assert "private models" in models and "onerror" not in models
        assert "<b>a source failed</b>" in await page.eval('document.getElementById("errors").innerText')
        assert "no figures: upstream_error" in await page.eval('document.getElementById("nodes").innerText')
        assert await page.eval(CONTRAST) == []
        assert await page.eval(UNNAMED) == []

        await page.press("/")
        for letter in "lag":
            await page.press(letter)
        await page.until(f'{ROWS}.join() == "lagos-1"')
        more = 'document.querySelector(".more")'
        await page.until("document.activeElement.id == 'filter' && (document.activeElement.blur(), true)")
        await page.eval(f"{more}.focus()")
        await page.press("Enter")
        await page.until(f'{more}.getAttribute("aria-expanded") == "true" && document.activeElement == {more}')
        assert "berlin" in await page.eval('document.querySelector("#models .site").innerText')
        assert page.complaints == []


async def test_a_phone_a_dark_room_and_chinese(lab: Lab, browser: str) -> None:
    async with seen(lab, SAID) as net, new_page(browser, width=390, dark=True, language="zh-CN") as page:
        await page.open(net.router.url)
        assert await page.eval("document.documentElement.lang") == "zh"
        assert await page.eval("document.documentElement.scrollWidth") == 390
        assert "节点" in await page.eval('document.getElementById("nodes").innerText')
        assert await page.eval("getComputedStyle(document.body).backgroundColor") == "rgb(20, 23, 26)"
        assert await page.eval(CONTRAST) == []
        await page.eval("""(() => { const theme = document.getElementById("theme");
            theme.value = "light"; theme.dispatchEvent(new Event("change")); })()""")
        assert await page.eval("getComputedStyle(document.body).backgroundColor") == "rgb(247, 247, 245)"
        assert await page.eval(CONTRAST) == []
        await page.open(await page.eval('document.getElementById("language").href'))
        await page.open(net.router.url)
        kept = "[document.documentElement.lang, document.documentElement.dataset.theme]"
        assert await page.eval(kept) == ["en", "light"]
        assert page.complaints == []


async def test_what_changes_is_said_and_what_is_old_too(lab: Lab, browser: str) -> None:
    look = "document.dispatchEvent(new Event('visibilitychange'))"  # as when somebody comes back to the page: it asks
    async with seen(lab, {("berlin", "berlin-1"): status({})}) as net, new_page(browser) as page:
        await page.open(net.router.url)
        assert "Nothing has been served today." in await page.eval('document.getElementById("models").innerText')
        member(net.router, "berlin-1", net.nodes["berlin-1"].url, region="berlin", draining=True)
        await page.until(f"({look}, document.getElementById('news').textContent) == 'berlin-1: draining'")
        assert await page.eval("document.getElementById('stale').hidden")
        net.router.stop()
        await page.eval("(() => { const now = Date.now; Date.now = () => now() + 20000; })()")
        await page.until("!document.getElementById('stale').hidden")
        assert "No answer from the router" in await page.eval("document.getElementById('stale').textContent")
        assert await page.eval("document.getElementById('live-text').textContent") == "Not live"


async def test_a_network_without_nodes_says_what_to_do(lab: Lab, browser: str) -> None:
    async with seen(lab, {}) as net, new_page(browser) as page:
        await page.open(net.router.url)
        said = await page.eval('document.getElementById("nodes").innerText')
        assert "No node has joined yet." in said and f"--router {net.router.url}" in said
        assert page.complaints == []
