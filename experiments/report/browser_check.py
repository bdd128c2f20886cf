"""Check a report in Chromium: ``python -m experiments.report.browser_check runs/default/report.html``.

Checks errors, external resources, overflow on phone and desktop, links, keyboard, contrast in light and dark mode, and load time.
Needs the extra ``report`` and an installed Chromium.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from groundscope.core.text import format_count

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

WIDTHS = (360, 1440)
"""Widths of a phone and a desktop, in CSS pixels."""
LARGEST = 5e6
"""Largest size of a report in bytes."""
SLOWEST = 1000.0
"""Longest load time in milliseconds."""
CONTRAST = 4.5
"""Smallest contrast of text and background (WCAG 2.2, level AA)."""
QUIET = ("--disable-background-networking", "--disable-component-update", "--disable-sync", "--no-first-run")

# Contrast by the relative luminance of WCAG 2.2, for all elements with text.
_CONTRAST = """() => {
  const lum = c => { const v = c.map(x => { x /= 255; return x <= .03928 ? x / 12.92 : ((x + .055) / 1.055) ** 2.4 });
    return .2126 * v[0] + .7152 * v[1] + .0722 * v[2] };
  const canvas = new OffscreenCanvas(1, 1).getContext('2d', {willReadFrequently: true});
  const rgba = s => { canvas.clearRect(0, 0, 1, 1); canvas.fillStyle = s; canvas.fillRect(0, 0, 1, 1);
    return [...canvas.getImageData(0, 0, 1, 1).data] };
  const ground = e => { for (; e; e = e.parentElement) { const c = rgba(getComputedStyle(e).backgroundColor);
    if (c[3] > 250) return c } return [255, 255, 255, 255] };
  const found = [];
  for (const e of document.querySelectorAll('body *:not(svg *)')) {
    if (![...e.childNodes].some(n => n.nodeType === 3 && n.textContent.trim()) || !e.checkVisibility()) continue;
    const a = lum(rgba(getComputedStyle(e).color)), b = lum(ground(e));
    const ratio = (Math.max(a, b) + .05) / (Math.min(a, b) + .05);
    if (ratio < LEAST) found.push(`${e.tagName.toLowerCase()} "${e.textContent.trim().slice(0, 40)}" ${ratio.toFixed(1)}`);
  }
  return found;
}""".replace("LEAST", str(CONTRAST))
_LOST = """() => [...document.querySelectorAll('a')].map(a => a.getAttribute('href'))
  .filter(h => !h || !h.startsWith('#') || !document.getElementById(decodeURIComponent(h.slice(1))))"""
_TIME = "() => performance.getEntriesByType('navigation')[0].loadEventEnd"


def problems(path: Path, screenshots: Path | None = None, chromium: str | None = None) -> list[str]:
    """Return the problems of a report.

    Parameters
    ----------
    path
        The HTML file.
    screenshots
        Folder for screenshots of the whole page.
    chromium
        Path of Chromium; by default the one on the search path.

    Raises
    ------
    FileNotFoundError
        If Chromium or the report is missing.
    """
    from playwright.sync_api import sync_playwright

    program = chromium or shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if program is None:
        msg = "Chromium is not installed (Debian, Ubuntu: apt install chromium)"
        raise FileNotFoundError(msg)
    if not path.is_file():
        msg = f"no report at '{path}'; run `groundscope` first"
        raise FileNotFoundError(msg)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=program, args=["--no-sandbox", *QUIET])
        try:
            return [f"{where}: {what}" for where, what in _check_views(browser, path, screenshots)]
        finally:
            browser.close()


def _check_views(browser: Browser, path: Path, screenshots: Path | None) -> Iterator[tuple[str, str]]:
    if path.stat().st_size > LARGEST:
        yield path.name, f"{path.stat().st_size / 1e6:.1f} MB, more than {LARGEST / 1e6:g}"
    for scheme in ("light", "dark"):
        for width in WIDTHS:
            where = f"{width} px, {scheme}"
            context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme)
            page = context.new_page()
            messages: list[str] = []
            page.on("console", lambda message, messages=messages: messages.append(message.text))
            page.on("pageerror", lambda error, messages=messages: messages.append(str(error)))
            page.on(
                "request",
                lambda request, messages=messages: messages.append(request.url) if _outside(request.url) else None,
            )
            page.goto(path.resolve().as_uri(), wait_until="load")
            yield from ((where, what) for what in _page(page))
            yield from ((where, f"console or network: {what}") for what in messages)
            if screenshots is not None:
                screenshots.mkdir(parents=True, exist_ok=True)
                page.screenshot(path=screenshots / f"{scheme}-{width}.png", full_page=True)
            context.close()


def _outside(url: str) -> bool:
    return not url.startswith(("file:", "data:", "blob:"))


def _page(page: Page) -> Iterator[str]:
    took: float = page.evaluate(_TIME)
    if took > SLOWEST:
        yield f"load time {took:.0f} ms, more than {SLOWEST:g}"
    yield from (f"link without target: {href}" for href in page.evaluate(_LOST))
    yield from _keyboard(page)
    # Open all details, so that their content is checked too.
    page.evaluate("() => document.querySelectorAll('details').forEach(d => d.open = true)")
    wide: list[Any] = page.evaluate("() => [document.documentElement.scrollWidth, innerWidth]")
    if wide[0] > wide[1]:
        yield f"{wide[0]} px wide on a screen of {wide[1]}"
    yield from (f"contrast: {what}" for what in page.evaluate(_CONTRAST))


def _keyboard(page: Page) -> Iterator[str]:
    """Move through the page with Tab, and open the first detail with Enter."""
    stops: int = page.evaluate("() => document.querySelectorAll('a, summary, [tabindex=\"0\"]').length")
    reached: set[int] = set()
    for _ in range(min(stops, 400)):
        page.keyboard.press("Tab")
        focus: list[Any] = page.evaluate(
            "() => [[...document.querySelectorAll('*')].indexOf(document.activeElement), "
            "getComputedStyle(document.activeElement).outlineStyle, document.activeElement.outerHTML.slice(0, 60)]"
        )
        if focus[2].startswith("<body"):
            # After the last stop the controls of the browser have the focus.
            continue
        reached.add(focus[0])
        if focus[1] == "none":
            yield f"no outline when focused: {focus[2]}"
            return
    if len(reached) < 0.5 * min(stops, 400):
        yield f"Tab reaches {len(reached)} of {format_count(stops, 'place')}"
    if page.query_selector("summary") is not None:
        page.focus("summary")
        page.keyboard.press("Enter")
        if not page.evaluate("() => document.querySelector('details').open"):
            yield "Enter does not open a detail"


def main() -> None:
    """Check the report named on the command line."""
    parser = argparse.ArgumentParser(description="Check a report in Chromium.")
    parser.add_argument("report", type=Path, nargs="?", default=Path("runs/default/report.html"))
    parser.add_argument("--screenshots", type=Path, help="folder for screenshots of the page")
    options = parser.parse_args()
    try:
        messages = problems(options.report, options.screenshots)
    except FileNotFoundError as error:
        parser.error(str(error))
    for message in messages:
        print(message)
    print(f"{options.report}: {format_count(len(messages), 'problem')}")
    sys.exit(bool(messages))


if __name__ == "__main__":
    main()
