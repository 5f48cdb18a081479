"""The HTML report in a real browser. Skipped where no Chromium is installed."""

import json
import re
import shutil
import subprocess

import pypdf
import pytest
from test_export import REPORT, prose, to_html

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = [pytest.mark.slow, pytest.mark.skipif(not BROWSER, reason="no Chromium on the PATH")]

# Reports what the page shows; added by the test only, the report itself has no script.
PROBE = """<script>
const box = e => e.getBoundingClientRect();
addEventListener("load", () => document.title = JSON.stringify([
  [...document.querySelectorAll("math")].map(e => box(e).width * box(e).height > 0),
  performance.getEntriesByType("resource").map(e => e.name).filter(n => !n.startsWith("data:")),
  document.documentElement.scrollWidth <= window.innerWidth,
  [...document.images].map(e => e.complete && e.naturalWidth > 0),
]));
</script>"""


def browse(path, tmp_path, *options):
    command = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", "--v=0",
               f"--user-data-dir={tmp_path / 'profile'}", "--virtual-time-budget=3000", *options]  # fmt: skip
    return subprocess.run([*command, f"file://{path}"], capture_output=True, text=True, timeout=60)


@pytest.mark.parametrize("width", [1400, 500])
def test_page_loads_alone_and_fits(tmp_path, width):
    wide = prose("| " + " | ".join(["column"] * 40) + " |\n" + "|--" * 40 + "|\n\n$$" + "x + " * 200 + "y$$")
    page = to_html(*REPORT, wide)
    path = tmp_path / "report.html"
    path.write_text(page.replace("</body>", PROBE + "</body>"), encoding="utf-8")
    log = tmp_path / "net.json"
    done = browse(path, tmp_path, f"--window-size={width},900", f"--log-net-log={log}", "--dump-dom")
    title = re.search(r"<title>(.*?)</title>", done.stdout, re.DOTALL)[1]
    assert title.startswith("[[true"), title
    maths, resources, fits, images = json.loads(title)
    assert maths and all(maths), "a formula has no size"
    assert images and all(images), "an image was not drawn"
    assert resources == []
    assert fits, "the page scrolls sideways"
    assert "CONSOLE" not in done.stderr
    asked = set(re.findall(r'"url":"(https?://[^"]+)"', log.read_text())) if log.exists() else set()
    assert not [url for url in asked if "report" in url or "example" in url]


def test_page_prints(tmp_path):
    path, pdf = tmp_path / "report.html", tmp_path / "print.pdf"
    wide = prose("| " + " | ".join(f"column{i}" for i in range(20)) + " |\n" + "|--" * 20 + "|")
    path.write_text(to_html(*REPORT, wide), encoding="utf-8")
    browse(path, tmp_path, f"--print-to-pdf={pdf}", "--no-pdf-header-footer")
    text = " ".join(page.extract_text() for page in pypdf.PdfReader(pdf).pages)
    assert "column19" in text, "a column is cut off"
    assert "Figure 2" in text and "Skip to the text" not in text and "Contents" not in text
