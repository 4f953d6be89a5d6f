"""The report in a real browser: it works, it asks nothing of any network, and no name gets out of its element."""

from __future__ import annotations

import csv
import json
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser, BrowserContext, Locator, Page, expect, sync_playwright

from cdclean import report
from cdclean.records import read_columns
from cdclean.report.rendering import visible
from cdclean.selection import select
from tests.test_report import AWKWARD, awkward_run, grouped_run

CHROMIUM = Path("/usr/bin/chromium")
pytestmark = pytest.mark.skipif(not CHROMIUM.exists(), reason="no Chromium here")

# The contrast of every visible text with what lies behind it, by the definition of WCAG 2.2; the worst first.
CONTRASTS = """() => {
  const canvas = document.createElement("canvas").getContext("2d", { willReadFrequently: true });
  const rgba = (colour) => {
    canvas.clearRect(0, 0, 1, 1);
    canvas.fillStyle = colour;
    canvas.fillRect(0, 0, 1, 1);
    return [...canvas.getImageData(0, 0, 1, 1).data];
  };
  const light = ([r, g, b]) => [r, g, b].map((v) => v / 255)
    .map((v) => (v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4))
    .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
  const behind = (element) => {
    for (let at = element; at; at = at.parentElement) {
      const colour = rgba(getComputedStyle(at).backgroundColor);
      if (colour[3] > 230) return colour;
    }
    return rgba("white");
  };
  const found = [];
  for (const element of document.body.querySelectorAll("*")) {
    const text = [...element.childNodes].filter((n) => n.nodeType === 3).map((n) => n.data.trim()).join("");
    const shown = element.checkVisibility({ visibilityProperty: true }) && element.getClientRects().length;
    if (!text || !shown || element.closest(":disabled, script, style, noscript, title")) continue;
    const style = getComputedStyle(element);
    const [a, b] = [light(rgba(element.ownerSVGElement ? style.fill : style.color)), light(behind(element))];
    const ratio = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
    found.push([ratio, `${element.tagName}.${element.getAttribute("class")}: ${text.slice(0, 40)}`]);
  }
  return found.sort((a, b) => a[0] - b[0]);
}"""


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        launched = playwright.chromium.launch(
            executable_path=str(CHROMIUM),
            headless=True,
            args=["--no-sandbox", "--disable-gpu", "--disable-background-networking"],
        )
        yield launched
        launched.close()


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = grouped_run(tmp_path_factory.mktemp("plain"))
    attributes = run.parent / "attributes.csv"
    keys = read_columns(run, ["key"])["key"].to_pylist()
    attributes.write_text("key,mark\n" + "".join(f"{key},{key[2] == 'p'}\n" for key in keys))
    report.write(run, attributes=attributes)
    return run


@pytest.fixture(scope="module")
def awkward(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = awkward_run(tmp_path_factory.mktemp("awkward"))
    report.write(run)
    return run


Open = Callable[..., Page]


@pytest.fixture
def open_(browser: Browser) -> Iterator[Open]:
    """Opens the page of a run; fails at the end of the test if it said, asked or raised anything."""
    contexts: list[BrowserContext] = []
    complaints: list[str] = []

    def open_page(run: Path, script: str = "", **options: Any) -> Page:
        context = browser.new_context(accept_downloads=True, **options)
        contexts.append(context)
        if script:
            context.add_init_script(script)
        page = context.new_page()
        page.on("console", lambda message: complaints.append(f"console: {message.text}"))
        page.on("pageerror", lambda error: complaints.append(f"error: {error}"))
        page.on("dialog", lambda dialog: (complaints.append(f"dialog: {dialog.message}"), dialog.dismiss()))
        context.on(
            "request", lambda request: None if local(request.url) else complaints.append(f"request: {request.url}")
        )
        page.goto((run / "report.html").as_uri())
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert not complaints


def local(url: str) -> bool:
    return url.startswith(("file:", "data:", "blob:"))


def button(page: Page, key: str, mark: str, gallery: str = "smallest") -> Locator:
    """The button that marks `key` in a gallery."""
    keys = [json.loads(item.get_attribute("data-key") or "") for item in page.locator(f"#{gallery} .item").all()]
    return page.locator(f"#{gallery} .item").nth(keys.index(key)).locator(f"[data-mark={mark}]")


def save(page: Page, mark: str, folder: Path) -> Path:
    with page.expect_download() as waiting:
        page.locator(f"[data-save={mark}]").click()
    path = folder / waiting.value.suggested_filename
    waiting.value.save_as(path)
    return path


def status(page: Page) -> str:
    return page.locator("#marked").inner_text()


# --- It is all there ---


def test_the_page_renders(open_: Open, plain: Path) -> None:
    page = open_(plain)
    assert page.title() == "dataset: cdclean report"
    assert "look" in page.locator("h1").inner_text()
    assert page.locator(".chart.wide rect.marked").count() > 0
    assert page.locator("#groups .chart.wide line.cutoff").count() == 1
    broken = page.locator("img").evaluate_all("images => images.filter(i => !i.naturalWidth).length")
    assert (broken, page.locator("img").count()) == (0, 3 * 96)
    assert page.locator("tbody tr.strong").count() > 0
    for link in page.locator("nav a").all():
        target = link.get_attribute("href") or ""
        assert page.locator(target).count() == 1, target


def test_it_is_built_for_a_screen_reader(open_: Open, plain: Path) -> None:
    page = open_(plain)
    levels = page.locator("h1, h2, h3").evaluate_all("all => all.map(h => Number(h.tagName[1]))")
    assert levels.count(1) == 1
    assert all(after - before <= 1 for before, after in pairwise(levels))
    for landmark in ("banner", "navigation", "main", "contentinfo"):
        assert page.get_by_role(landmark).count() == 1, landmark  # type: ignore[arg-type]
    assert page.locator("html").get_attribute("lang") == "en"
    unnamed = "all => all.filter(e => !(e.getAttribute('aria-label') || e.textContent).trim()).length"
    assert page.locator("button, a, [role=group], [role=region]:not([aria-labelledby])").evaluate_all(unnamed) == 0
    assert page.locator("img:not([alt]), img[alt='']").count() == 0
    assert page.locator("th:not([scope])").count() == 0
    doubled = "all => all.length - new Set(all.map(e => e.id)).size"
    assert page.locator("[id]").evaluate_all(doubled) == 0
    pointed = (
        "all => all.flatMap(e => ['aria-labelledby', 'aria-describedby'].map(n => e.getAttribute(n))).filter(Boolean)"
    )
    for name in set(page.locator("[aria-labelledby], [aria-describedby]").evaluate_all(pointed)):
        assert page.locator(f"[id='{name}']").count() == 1, name


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_every_text_can_be_read(open_: Open, plain: Path, scheme: str) -> None:
    page = open_(plain, color_scheme=scheme)
    page.locator("[data-mark=keep]").first.click()
    page.locator("[data-mark=drop]").nth(1).click()
    page.evaluate("document.querySelectorAll('details').forEach(part => { part.open = true; })")
    found = page.evaluate(CONTRASTS)
    assert len(found) > 300
    assert found[0][0] >= 4.5, found[:5]
    ground = page.evaluate("getComputedStyle(document.body).backgroundColor")
    brightness = sum(int(value) for value in ground.removeprefix("rgb(").removesuffix(")").split(", ")) / 3
    assert (brightness < 60) == (scheme == "dark")


def test_a_narrow_screen_does_not_scroll_sideways(open_: Open, plain: Path, awkward: Path) -> None:
    for run in (plain, awkward):
        page = open_(run, viewport={"width": 360, "height": 800})
        assert page.evaluate("document.documentElement.scrollWidth") == 360
    assert page.locator(".chart.narrow").first.is_visible()
    assert not page.locator(".chart.wide").first.is_visible()


def test_paper_gets_what_can_be_read_on_paper(open_: Open, plain: Path) -> None:
    page = open_(plain)
    keep = page.locator("[data-mark=keep]").first
    keep.click()
    page.emulate_media(media="print")
    page.evaluate("dispatchEvent(new Event('beforeprint'))")
    for selector in ("nav", ".review", ".copy", ".histogram details"):
        assert not page.locator(selector).first.is_visible(), selector
    assert keep.is_visible()
    assert not page.locator("[data-mark=drop]").first.is_visible()
    assert page.locator("#settings dd").first.is_visible()
    page.evaluate("dispatchEvent(new Event('afterprint'))")
    assert not page.locator("#settings dd").first.is_visible()


def test_without_script_the_page_can_still_be_read(open_: Open, plain: Path) -> None:
    page = open_(plain, java_script_enabled=False)
    assert page.locator("noscript").is_visible()
    assert page.locator("img").count() == 3 * 96  # four galleries
    assert not page.locator(".marks").first.is_visible()
    assert not page.locator(".review").is_visible()


# --- Names ---


def test_no_name_gets_out_of_its_element(open_: Open, awkward: Path) -> None:
    page = open_(awkward)
    assert page.locator("script").count() == 1
    assert page.locator(".item bdi > *, td bdi > *, th bdi > *, h1 > *").count() == 0
    assert page.locator("img").evaluate_all("all => all.every(i => i.src.startsWith('data:image/'))")
    shown = page.locator("#smallest .key").all_text_contents()
    assert set(shown) == {visible(name) for name in AWKWARD}
    keys = page.locator("#smallest .item").evaluate_all("all => all.map(item => JSON.parse(item.dataset.key))")
    assert set(keys) == set(AWKWARD)


@pytest.fixture
def server() -> Iterator[tuple[str, list[str]]]:
    """The address of a server on this machine, and the paths that it was asked for."""
    asked: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            self.send_error(404)

        def log_message(self, *_: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as listening:
        threading.Thread(target=listening.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{listening.server_port}", asked
        listening.shutdown()


def test_the_policy_holds(browser: Browser, plain: Path, server: tuple[str, list[str]]) -> None:
    """Were there a hole in the escaping after all, nothing could run or leave."""
    address, asked = server
    page = browser.new_page()
    page.goto((plain / "report.html").as_uri())
    ran, fetched, broken = page.evaluate(
        """async (address) => {
          const broken = [];
          addEventListener("securitypolicyviolation", (event) => broken.push(event.effectiveDirective));
          document.body.insertAdjacentHTML("beforeend", `<img src=x onerror="window.ran = 1">
            <img src="${address}/image"><iframe src="${address}/frame"></iframe>
            <link rel="stylesheet" href="${address}/style"><p style="color: red">x</p>`);
          const script = document.createElement("script");
          script.textContent = "window.ran = 2";
          document.body.append(script);
          const fetched = await fetch(address).catch(() => "refused");
          await new Promise((done) => setTimeout(done, 100));
          return [window.ran ?? "nothing", fetched, broken];
        }""",
        address,
    )
    assert (ran, fetched) == ("nothing", "refused")
    assert {"img-src", "script-src-elem", "style-src-elem", "style-src-attr", "connect-src", "frame-src"} <= set(broken)
    assert not asked
    page.goto(address)
    assert asked
    page.close()


# --- Marks ---


def test_marks_become_lists_that_filter_takes(open_: Open, awkward: Path, tmp_path: Path) -> None:
    page = open_(awkward)
    kept, dropped = AWKWARD[:-2], AWKWARD[-2:]
    for key in kept:
        button(page, key, "keep").click()
    for key in dropped:
        button(page, key, "drop").click()
    assert status(page) == f"{len(kept)} marked keep, {len(dropped)} marked drop."
    lists = {mark: save(page, mark, tmp_path) for mark in ("keep", "drop")}
    assert {mark: path.name for mark, path in lists.items()} == {"keep": "dataset-keep.csv", "drop": "dataset-drop.csv"}
    for mark, keys in (("keep", kept), ("drop", dropped)):
        with lists[mark].open(newline="", encoding="utf-8") as file:
            header, *rows = csv.reader(file)
        assert header == ["key"]
        assert sorted(row[0] for row in rows) == sorted(keys)
    chosen = select(awkward, quantile=1, keep=lists["keep"], drop=lists["drop"])
    keep = dict(zip(chosen.decisions["key"].to_pylist(), chosen.decisions["keep"].to_pylist(), strict=True))
    assert {key for key, kept in keep.items() if kept} == set(kept)
    assert page.locator("#then code").is_visible()
    line = page.locator("#then code").inner_text()
    assert line.endswith("--keep dataset-keep.csv --drop dataset-drop.csv")


def test_a_mark_is_one_of_two_and_the_same_everywhere(open_: Open, awkward: Path) -> None:
    page = open_(awkward)
    key = AWKWARD[0]
    keep, drop = button(page, key, "keep"), button(page, key, "drop")
    keep.click()
    assert keep.get_attribute("aria-pressed") == "true"
    assert button(page, key, "keep", "random").get_attribute("aria-pressed") == "true"
    drop.click()
    assert (keep.get_attribute("aria-pressed"), drop.get_attribute("aria-pressed")) == ("false", "true")
    drop.click()
    assert drop.get_attribute("aria-pressed") == "false"
    assert page.locator("[data-save=drop]").is_disabled()
    assert status(page).startswith("No marks yet")


def test_marks_survive_a_reload_and_belong_to_their_run(open_: Open, awkward: Path, plain: Path) -> None:
    page = open_(awkward)
    button(page, "cat/__proto__", "keep").click()
    button(page, AWKWARD[6], "drop").click()
    assert status(page) == "1 marked keep, 1 marked drop."
    page.reload()
    assert status(page) == "1 marked keep, 1 marked drop."
    assert button(page, "cat/__proto__", "keep").get_attribute("aria-pressed") == "true"
    assert button(page, AWKWARD[6], "drop").get_attribute("aria-pressed") == "true"
    assert "remembers them" in page.locator("#memory").inner_text()
    page.goto((plain / "report.html").as_uri())
    assert status(page).startswith("No marks yet")


@pytest.mark.parametrize("stored", ["{", "null", '[["a", "explode"], 3, [4, "keep"]]', '{"a": "keep"}'])
def test_memory_that_is_damaged_is_empty(open_: Open, awkward: Path, stored: str) -> None:
    script = f"Storage.prototype.getItem = () => {json.dumps(stored)};"
    page = open_(awkward, script)
    assert status(page).startswith("No marks yet")
    page.locator("[data-mark=keep]").first.click()
    assert status(page) == "1 marked keep, 0 marked drop."


def test_a_browser_without_memory_says_so(open_: Open, awkward: Path, tmp_path: Path) -> None:
    denied = "Object.defineProperty(window, 'localStorage', { get() { throw new DOMException('denied'); } });"
    page = open_(awkward, denied)
    button(page, AWKWARD[5], "keep").click()
    assert "does not remember" in page.locator("#memory").inner_text()
    assert save(page, "keep", tmp_path).read_text() == 'key\n"cat/a ""quoted"", name.png"\n'


def test_clearing_asks_first(browser: Browser, awkward: Path) -> None:
    page = browser.new_page()
    page.goto((awkward / "report.html").as_uri())
    page.locator("[data-mark=keep]").first.click()
    for answer, left in (("dismiss", "1 marked keep, 0 marked drop."), ("accept", "No marks yet")):
        page.once("dialog", lambda dialog, answer=answer: getattr(dialog, answer)())
        page.locator("#clear").click()
        assert status(page).startswith(left)
    page.reload()
    assert status(page).startswith("No marks yet")
    page.close()


# --- Keyboard ---


def test_the_keyboard_is_enough(open_: Open, awkward: Path, tmp_path: Path) -> None:
    page = open_(awkward)
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.className") == "skip"
    page.keyboard.press("Enter")
    assert page.evaluate("document.activeElement.id") == "main"
    for _ in range(200):
        page.keyboard.press("Tab")
        if page.evaluate("document.activeElement.dataset.mark") == "keep":
            break
    outline = page.evaluate("getComputedStyle(document.activeElement).outlineStyle")
    assert outline == "solid"
    page.keyboard.press("Space")
    assert status(page) == "1 marked keep, 0 marked drop."
    page.keyboard.press("Tab")
    page.keyboard.press("Enter")
    assert status(page) == "0 marked keep, 1 marked drop."
    page.locator("[data-save=drop]").focus()
    with page.expect_download() as waiting:
        page.keyboard.press("Enter")
    assert waiting.value.suggested_filename == "dataset-drop.csv"


def test_tables_sort_by_the_pressed_heading(open_: Open, plain: Path) -> None:
    page = open_(plain)
    table = page.locator("#classes table").first
    headings = table.locator("th[data-sort]")

    def column(index: int) -> list[str]:
        return table.locator(f"tbody tr > :nth-child({index + 1})").evaluate_all("all => all.map(c => c.dataset.value)")

    headings.nth(1).locator("button").focus()
    for order in ("descending", "ascending", "descending"):
        page.keyboard.press("Enter")
        assert headings.nth(1).get_attribute("aria-sort") == order
        numbers = [float(value) for value in column(1)]
        assert numbers == sorted(numbers, reverse=order == "descending")
    headings.nth(0).locator("button").click()
    assert column(0) == ["a", "b", "c"]
    assert table.locator("th[aria-sort]").count() == 1
    assert page.locator("#bias th[data-sort] button").count() == 9 + 8  # within each predicted class, and the whole


def test_what_is_not_tested_sorts_beyond_all_that_is(open_: Open, plain: Path) -> None:
    table = open_(plain).locator("#bias table").last
    cells = table.locator("tbody tr > :nth-child(7)")
    heading = table.locator("th", has_text="q").last
    for order in ("descending", "ascending"):
        heading.locator("button").click()
        assert heading.get_attribute("aria-sort") == order
        described = [text == "-" for text in cells.all_inner_texts()]
        assert (described.count(True), described.count(False)) == (6, 2)
        assert described == sorted(described, reverse=order == "descending")


def test_commands_can_be_copied(browser: Browser, plain: Path) -> None:
    context = browser.new_context()
    context.grant_permissions(["clipboard-read", "clipboard-write"])
    page = context.new_page()
    page.goto((plain / "report.html").as_uri())
    first = page.locator("#next .command").first
    first.locator("button").click()
    expect(first.locator("button")).to_have_text("Copied")
    assert page.evaluate("navigator.clipboard.readText()") == first.locator("code").inner_text()
    context.close()
