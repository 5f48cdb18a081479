"""The HTML report in a real browser. Skipped where no Chromium is installed."""

import html
import json
import re
import shutil
import subprocess
from pathlib import Path

import axe_playwright_python
import pypdf
import pytest
from test_export import REPORT, code, figure, prose, to_html

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = [pytest.mark.slow, pytest.mark.skipif(not BROWSER, reason="no Chromium on the PATH")]

# Reports what the page shows; added by the test only
PROBE = """<script>
const box = e => e.getBoundingClientRect();
addEventListener("load", () => document.title = JSON.stringify([
  [...document.querySelectorAll("math")].map(e => box(e).width * box(e).height > 0),
  performance.getEntriesByType("resource").map(e => e.name).filter(n => !n.startsWith("data:")),
  document.documentElement.scrollWidth <= window.innerWidth,
  [...document.images].map(e => e.complete && e.naturalWidth > 0),
]));
</script>"""


def probed(page: str, script: str = PROBE) -> str:
    """The page with a script of the test's, whose policy would refuse it."""
    policy = re.search(r'<meta http-equiv="Content-Security-Policy"[^>]*>', page)[0]
    return page.replace(policy, "").replace("</body>", script + "</body>")


def browse(path, tmp_path, *options):
    command = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", "--v=0",
               f"--user-data-dir={tmp_path / 'profile'}", "--virtual-time-budget=3000", *options]  # fmt: skip
    return subprocess.run([*command, f"file://{path}"], capture_output=True, text=True, timeout=60)


@pytest.mark.parametrize("width", [1400, 500])
def test_page_loads_alone_and_fits(tmp_path, width):
    wide = prose("| " + " | ".join(["column"] * 40) + " |\n" + "|--" * 40 + "|\n\n$$" + "x + " * 200 + "y$$")
    page = to_html(*REPORT, wide)
    path = tmp_path / "report.html"
    path.write_text(probed(page), encoding="utf-8")
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


USE = """<script>
addEventListener("load", () => {
  const rows = () => [...document.querySelectorAll("tbody tr")].filter(row => !row.hidden).map(row => row.textContent);
  const found = { before: rows() };
  const sort = document.querySelectorAll("thead button")[1];
  sort.click();
  found.rising = rows();
  sort.click();
  found.falling = rows();
  const filter = document.querySelector("input[type=search]");
  filter.value = "second";
  filter.dispatchEvent(new Event("input"));
  found.filtered = rows();
  const colour = () => getComputedStyle(document.body).backgroundColor;
  found.light = colour();
  document.querySelector("button.theme").click();
  found.dark = colour();
  document.querySelector("figure img").dispatchEvent(new KeyboardEvent("keydown", { key: "Enter" }));
  found.by_key = document.querySelector("dialog[open] img").alt;
  document.querySelector("dialog[open] button").click();
  document.querySelector("figure img").click();
  found.enlarged = document.querySelector("dialog[open] img").alt;
  document.querySelector("dialog[open] button").click();
  found.closed = document.querySelectorAll("dialog[open]").length;
  found.links = [...document.querySelectorAll(".permalink")].map(link => link.hash);
  document.title = JSON.stringify(found);
});
</script>"""


def test_long_tables_are_sorted_and_filtered_and_pictures_enlarged(tmp_path):
    values = {"a": 3, "b": 20, "c": 100, "d": "−1", "e": 7, "f": 5, "g": "4×10⁻⁸"}
    rows = "".join(f"| {name}{i} | {value} |\n" for i, (name, value) in enumerate(values.items()))
    table = f"| name | value |\n|---|--:|\n| first | |\n{rows}| second | |\n{rows}"
    page = to_html(prose("# T"), prose("## Größe"), code(*figure()), prose(table))
    path = tmp_path / "report.html"
    path.write_text(probed(page, USE), encoding="utf-8")
    done = browse(path, tmp_path, "--dump-dom")
    assert "CONSOLE" not in done.stderr
    found = json.loads(html.unescape(re.search(r"<title>(.*?)</title>", done.stdout, re.DOTALL)[1]))
    assert found["before"][:3] == ["first", "a03", "b120"] and len(found["before"]) == 16
    assert found["rising"][:8] == ["first", "d3−1", "g64×10⁻⁸", "a03", "f55", "e47", "b120", "c2100"]
    assert found["falling"][8:11] == ["second", "c2100", "b120"]
    assert found["filtered"] == found["falling"][8:]
    assert found["light"] != found["dark"]
    assert (found["by_key"], found["enlarged"], found["closed"]) == ("A falling line", "A falling line", 0)
    assert found["links"] == ["#gr%C3%B6%C3%9Fe"]


AXE = (Path(axe_playwright_python.__file__).parent / "axe.min.js").read_text(encoding="utf-8")
CHECK = """<script>
addEventListener("load", async () => {
  const { violations } = await axe.run();
  document.title = JSON.stringify(violations.map(each => [each.id, each.nodes.map(node => node.html.slice(0, 200))]));
});
</script>"""


def violations(page: str, tmp_path, *, width: int) -> list:
    """What axe finds wrong with a page for people who see or hear it otherwise."""
    path = tmp_path / "axe.html"
    path.write_text(probed(page, f"<script>{AXE}</script>{CHECK}"), encoding="utf-8")
    done = browse(path, tmp_path, f"--window-size={width},900", "--virtual-time-budget=30000", "--dump-dom")
    return json.loads(html.unescape(re.search(r"<title>(.*?)</title>", done.stdout, re.DOTALL)[1]))


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_axe_finds_nothing(theme, tmp_path):
    page = to_html(*REPORT).replace("<html ", f'<html data-theme="{theme}" ')
    assert violations(page, tmp_path, width=500) == []
    assert violations(page.replace("<h1>", '<h1><img src="data:,">'), tmp_path, width=500)[0][0] == "image-alt"
