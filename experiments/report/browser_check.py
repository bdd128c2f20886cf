"""Look at a report in Chromium: ``python -m experiments.report.browser_check runs/default/report.html``.

Errors, loading from elsewhere, overflow on a phone and on a desk, links, the keyboard, contrast in light and dark, and how
long it takes to open. Needs the extra ``report`` and a Chromium on the machine.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

WIDTHS = (360, 1440)
"""Of a phone and of a desk, in CSS pixels."""
LARGEST = 5e6
"""Bytes a report may have."""
SLOWEST = 1000.0
"""Milliseconds until it is open."""
CONTRAST = 4.5
"""Least contrast of text and ground (WCAG 2.2, level AA)."""
QUIET = ("--disable-background-networking", "--disable-component-update", "--disable-sync", "--no-first-run")

# The relative luminance of WCAG 2.2, and what lies behind an element, of all elements that hold text themselves.
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
    """Return what is wrong with a report; nothing where all is well.

    Parameters
    ----------
    path
        The HTML file.
    screenshots
        Folder to leave pictures of the whole page in.
    chromium
        Its program; by default the one on the path.

    Raises
    ------
    FileNotFoundError
        Where there is no Chromium, or no report.
    """
    from playwright.sync_api import sync_playwright

    program = chromium or shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if program is None:
        msg = "no Chromium on this machine: install it (Debian, Ubuntu: apt install chromium)"
        raise FileNotFoundError(msg)
    if not path.is_file():
        msg = f"no report at '{path}': make one with `groundscope`"
        raise FileNotFoundError(msg)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=program, args=["--no-sandbox", *QUIET])
        try:
            return [f"{where}: {what}" for where, what in _look(browser, path, screenshots)]
        finally:
            browser.close()


def _look(browser: Browser, path: Path, screenshots: Path | None) -> Iterator[tuple[str, str]]:
    if path.stat().st_size > LARGEST:
        yield path.name, f"{path.stat().st_size / 1e6:.1f} MB, more than {LARGEST / 1e6:g}"
    for scheme in ("light", "dark"):
        for width in WIDTHS:
            where = f"{width} px, {scheme}"
            context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme)
            page = context.new_page()
            said: list[str] = []
            page.on("console", lambda message, said=said: said.append(message.text))
            page.on("pageerror", lambda error, said=said: said.append(str(error)))
            page.on("request", lambda request, said=said: said.append(request.url) if _outside(request.url) else None)
            page.goto(path.resolve().as_uri(), wait_until="load")
            yield from ((where, what) for what in _page(page))
            yield from ((where, f"console or network: {what}") for what in said)
            if screenshots is not None:
                screenshots.mkdir(parents=True, exist_ok=True)
                page.screenshot(path=screenshots / f"{scheme}-{width}.png", full_page=True)
            context.close()


def _outside(url: str) -> bool:
    return not url.startswith(("file:", "data:", "blob:"))


def _page(page: Page) -> Iterator[str]:
    took: float = page.evaluate(_TIME)
    if took > SLOWEST:
        yield f"open after {took:.0f} ms, more than {SLOWEST:g}"
    yield from (f"link to nowhere: {href}" for href in page.evaluate(_LOST))
    yield from _keyboard(page)
    # All that can be opened, so that what is inside is measured too.
    page.evaluate("() => document.querySelectorAll('details').forEach(d => d.open = true)")
    wide: list[Any] = page.evaluate("() => [document.documentElement.scrollWidth, innerWidth]")
    if wide[0] > wide[1]:
        yield f"{wide[0]} px wide on a screen of {wide[1]}"
    yield from (f"contrast: {what}" for what in page.evaluate(_CONTRAST))


def _keyboard(page: Page) -> Iterator[str]:
    """Walk from link to link with Tab, and open the first detail with Enter."""
    stops: int = page.evaluate("() => document.querySelectorAll('a, summary, [tabindex=\"0\"]').length")
    reached: set[int] = set()
    for _ in range(min(stops, 400)):
        page.keyboard.press("Tab")
        focus: list[Any] = page.evaluate(
            "() => [[...document.querySelectorAll('*')].indexOf(document.activeElement), "
            "getComputedStyle(document.activeElement).outlineStyle, document.activeElement.outerHTML.slice(0, 60)]"
        )
        if focus[2].startswith("<body"):
            # Past the last stop the browser's own controls have the focus.
            continue
        reached.add(focus[0])
        if focus[1] == "none":
            yield f"no outline when focused: {focus[2]}"
            return
    if len(reached) < 0.5 * min(stops, 400):
        yield f"Tab reaches {len(reached)} of {stops} places"
    if page.query_selector("summary") is not None:
        page.focus("summary")
        page.keyboard.press("Enter")
        if not page.evaluate("() => document.querySelector('details').open"):
            yield "Enter does not open a detail"


def main() -> None:
    """Check the report named on the command line."""
    parser = argparse.ArgumentParser(description="Look at a report in Chromium.")
    parser.add_argument("report", type=Path, nargs="?", default=Path("runs/default/report.html"))
    parser.add_argument("--screenshots", type=Path, help="folder to leave pictures of the page in")
    options = parser.parse_args()
    try:
        found = problems(options.report, options.screenshots)
    except FileNotFoundError as error:
        parser.error(str(error))
    for problem in found:
        print(problem)
    print(f"{options.report}: {f'{len(found)} problems' if found else 'no problem found'}")
    sys.exit(bool(found))


if __name__ == "__main__":
    main()
