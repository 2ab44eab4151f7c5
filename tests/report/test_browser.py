"""The page in a real browser: it renders, sorts, and asks the network for nothing."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from bench.report.write import ReportFiles

CHROMIUM = next(
    (p for n in ("chromium", "chromium-browser", "google-chrome", "chrome") if (p := shutil.which(n))), None
)
pytestmark = [pytest.mark.browser, pytest.mark.skipif(CHROMIUM is None, reason="no headless Chromium on this machine")]


def chromium(profile: Path, *arguments: str) -> str:
    """Run it headless without a network service of its own; returns what it prints."""
    assert CHROMIUM is not None
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--no-first-run", "--disable-sync",
             "--hide-scrollbars", f"--user-data-dir={profile}"]  # fmt: skip
    done = subprocess.run([CHROMIUM, *flags, *arguments], capture_output=True, text=True, timeout=120)
    return done.stdout


def test_a_screenshot_shows_the_page(files: ReportFiles, tmp_path: Path) -> None:
    from matplotlib.image import imread

    for name, extra in (("light", []), ("dark", ["--blink-settings=preferredColorScheme=0"])):
        picture = tmp_path / f"{name}.png"
        chromium(tmp_path / name, *extra, "--window-size=1200,2400", f"--screenshot={picture}", files.html.as_uri())
        image = imread(picture)
        assert image.shape[:2] == (2400, 1200)
        middle = image[::4, ::4, :3]
        assert middle.std() > 0.05, "blank page"
        assert (middle.mean() > 0.6) == (name == "light")


def test_scripts_run_and_nothing_is_fetched(files: ReportFiles, tmp_path: Path) -> None:
    """A copy of the page with a probe: sorts a table by clicking and writes down what the browser loaded."""
    probe = """<script>
      const table = document.querySelector('#table-throughput');
      const button = table.querySelectorAll('th button')[2];
      const column = () => [...table.tBodies[0].rows].map(r => Number(r.cells[2].dataset.sort));
      button.click(); const up = column(); button.click(); const down = column();
      const sorted = (a, s) => a.every((v, i) => i === 0 || s * (v - a[i - 1]) >= 0);
      const out = document.createElement('pre'); out.id = 'probe';
      const wide = document.documentElement.scrollWidth > document.documentElement.clientWidth;
      const broken = [...document.querySelectorAll('.picture svg')].filter(s => s.getBoundingClientRect().height < 100).length;
      out.textContent = JSON.stringify({up: sorted(up, 1), down: sorted(down, -1), rows: up.length, wide: wide, broken: broken,
        pictures: document.querySelectorAll('.picture svg').length,
        loaded: performance.getEntriesByType('resource').map(e => e.name)});
      document.body.append(out);
    </script></body>"""
    page = tmp_path / "probe.html"
    page.write_text(files.html.read_text().replace("</body>", probe))
    dom = chromium(tmp_path / "profile", "--virtual-time-budget=3000", "--dump-dom", page.as_uri())
    found = re.search(r'<pre id="probe">(.*?)</pre>', dom)
    assert found is not None, dom[:500]
    assert found[1] == '{"up":true,"down":true,"rows":7,"wide":false,"broken":0,"pictures":7,"loaded":[]}'


def test_it_fits_a_narrow_window(files: ReportFiles, tmp_path: Path) -> None:
    probe = "<script>document.title = document.documentElement.scrollWidth + '/' + window.innerWidth</script></body>"
    page = tmp_path / "narrow.html"
    page.write_text(files.html.read_text().replace("</body>", probe))
    dom = chromium(tmp_path / "profile", "--window-size=500,900", "--dump-dom", page.as_uri())
    found = re.search(r"<title>(\d+)/(\d+)</title>", dom)
    assert found is not None and int(found[1]) <= int(found[2])
