"""A report in real headless Chromium, at the size of a desktop and of a phone: no console errors, pictures to look at.

    pip install playwright
    python tests/acceptance/report_browser.py report.html --chromium /usr/bin/chromium-headless-shell

Without --chromium the browser that `playwright install chromium` fetched is used. The network is off throughout.
"""

import argparse
import sys
from pathlib import Path

from playwright.sync_api import sync_playwright

SIZES = {"desktop": (1280, 900), "phone": (390, 844)}
MOST_BYTES = 5_000_000
CANVASES = """() => {
    let count = 0;
    const walk = root => root.querySelectorAll('*').forEach(element => {
        if (element.tagName === 'CANVAS' && element.width > 50) count += 1;
        if (element.shadowRoot) walk(element.shadowRoot);
    });
    walk(document);
    return count;
}"""


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("page", type=Path)
    parser.add_argument("--chromium", default=None)
    parser.add_argument("--out", type=Path, default=Path())
    given = parser.parse_args()
    faults = []
    size = given.page.stat().st_size
    if size > MOST_BYTES:
        faults.append(f"{size:,} bytes are more than {MOST_BYTES:,}")
    with sync_playwright() as play:
        browser = play.chromium.launch(executable_path=given.chromium, args=["--no-sandbox"])
        for name, (width, height) in SIZES.items():
            context = browser.new_context(
                viewport={"width": width, "height": height}, is_mobile=name == "phone", offline=True
            )
            page = context.new_page()
            page.on(
                "console", lambda told, at=name: faults.append(f"{at}: {told.text}") if told.type == "error" else None
            )
            page.on("pageerror", lambda error, at=name: faults.append(f"{at}: {error}"))
            page.on("request", lambda asked, at=name: faults.append(f"{at}: asks for {asked.url}")
                    if not asked.url.startswith(("file:", "data:", "blob:")) else None)  # fmt: skip
            page.goto(given.page.resolve().as_uri())
            page.wait_for_timeout(1500)
            for closed in page.query_selector_all("details"):
                closed.evaluate("element => element.open = true")
            page.wait_for_timeout(1500)
            wide = page.evaluate("document.documentElement.scrollWidth")
            if wide > width:
                faults.append(f"{name}: the page is {wide} pixels wide on a screen of {width}")
            charts = page.evaluate(CANVASES)
            expected = page.evaluate("document.querySelectorAll('.charts > div').length")
            if charts < expected:
                faults.append(f"{name}: {charts} of {expected} charts are drawn")
            page.screenshot(path=str(given.out / f"{given.page.stem}-{name}.png"))
            for place, found in enumerate(page.query_selector_all(".charts")[:2]):
                found.scroll_into_view_if_needed()
                page.screenshot(path=str(given.out / f"{given.page.stem}-{name}-charts-{place}.png"))
            print(f"{name}: {wide} of {width} pixels wide, {charts} of {expected} charts, title {page.title()!r}")
            context.close()
        browser.close()
    print(f"{size:,} bytes; faults: {faults or 'none'}")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
