"""The documentation's pictures of a study's page, taken in Chromium.

python -m benchmarks.report_pictures runs/studies/quickstart/report.html --out docs/pictures
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path
from typing import Any

WIDTH, HEIGHT = 1200, 800
MOST_BYTES = 300_000
PARTS = {
    "report_methods": ("methods",),
    "report_search": ("history", "curves"),
    "report_parameters": ("importance-hcd", "parallel-hcd"),
    "report_student": ("confusion", "cka"),
}
"""By picture, the figures that it shows side by side."""


def main() -> None:
    """Read the arguments and take the pictures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("page", type=Path, help="report.html of a finished study")
    parser.add_argument("--out", type=Path, default=Path("docs/pictures"))
    given = parser.parse_args()
    found = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if found is None:
        raise SystemExit("there is no Chromium here (Debian: apt-get install chromium)")
    from playwright.sync_api import sync_playwright

    given.out.mkdir(parents=True, exist_ok=True)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=found, args=["--no-sandbox", "--disable-gpu"])
        page = browser.new_page(viewport={"width": WIDTH, "height": HEIGHT}, device_scale_factor=1.25)
        page.goto(given.page.resolve().as_uri())
        page.screenshot(path=given.out / "report.png", clip=_whole(page, ("glance", "methods"), top=0), full_page=True)
        for name, figures in PARTS.items():
            if all(page.locator(f"#{one}").count() for one in figures):
                page.screenshot(path=given.out / f"{name}.png", clip=_whole(page, figures), full_page=True)
        browser.close()
    for file in sorted(given.out.glob("report*.png")):
        size = file.stat().st_size
        print(f"{file}  {size / 1000:.0f} kB")
        assert size < MOST_BYTES, f"{file} is larger than the documentation wants"


def _whole(page: Any, figures: tuple[str, ...], top: float | None = None) -> dict[str, float]:
    """The rectangle around some figures; from `top` on and as wide as the window where that is given."""
    boxes = [page.locator(f"#{one}").bounding_box() for one in figures]
    left, above = min(box["x"] for box in boxes), min(box["y"] for box in boxes)
    right, below = max(box["x"] + box["width"] for box in boxes), max(box["y"] + box["height"] for box in boxes)
    if top is not None:
        return {"x": 0, "y": top, "width": WIDTH, "height": below + 12}
    return {"x": left - 6, "y": above - 6, "width": right - left + 12, "height": below - above + 12}


if __name__ == "__main__":
    main()
