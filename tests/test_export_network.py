"""The HTML report in Chromium beside a server that counts: the page asks nobody for anything."""

import http.server
import re
import shutil
import subprocess
import threading

import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

from transformnet_lib.export import HTMLReportExporter

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = [pytest.mark.slow, pytest.mark.skipif(not BROWSER, reason="no Chromium on the PATH")]


class Server(http.server.ThreadingHTTPServer):
    """Answers everything, and remembers the paths asked for."""

    def __init__(self, pages: dict[str, str]):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.pages, self.asked = pages, []
        self.root = f"http://127.0.0.1:{self.server_port}"


class _Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.server.asked.append(self.path)
        self.send_response(200)
        self.send_header("Content-Type", "text/html; charset=utf-8")
        self.end_headers()
        self.wfile.write(self.server.pages.get(self.path, "").encode())

    def log_message(self, *args):
        pass


@pytest.fixture
def server():
    with Server({}) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


def visit(url: str, tmp_path) -> subprocess.CompletedProcess:
    """Load `url`; stdout is the DOM, lines with CONSOLE in stderr the browser's console."""
    command = [
        BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--no-first-run",
        "--enable-logging=stderr", "--v=0", "--disable-dev-shm-usage", f"--user-data-dir={tmp_path / 'profile'}",
        "--virtual-time-budget=2000", "--dump-dom", url,
    ]  # fmt: skip
    return subprocess.run(command, capture_output=True, text=True, timeout=60)


def hostile_report(root: str) -> str:
    """A report from a notebook that tries every way to have `root` asked."""
    svg = (
        '<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9">'
        f'<style>@import url({root}/svg.css);</style><image href="{root}/svg.png" width="9" height="9"/>'
        f"<script>fetch('{root}/svg')</script></svg>"
    )
    tricks = (
        f'<script src="{root}/a.js"></script> <img src="{root}/b.png"> ![c]({root}/c.png) [d]({root}/d)\n\n'
        f'<link rel="stylesheet" href="{root}/e.css"><iframe src="{root}/f"></iframe>\n\n'
        f"</style><style>@import url({root}/g.css);</style> <b style='background: url({root}/h)'>h</b>\n\n"
        f"$\\text{{<img src={root}/i>}}$ and $x^2$\n\n```{root}/j\n<img src={root}/k>\n```"
    )
    outputs = [
        new_output("display_data", {"image/svg+xml": svg}),
        new_output("display_data", {"text/html": f"<table><tr><td><img src='{root}/l'>1</td></tr></table>"}),
        new_output("stream", text=f"<img src='{root}/m'>"),
    ]
    cells = [new_markdown_cell("# T\n\n" + tricks), new_code_cell(f"'<img src={root}/n>'", outputs=outputs)]
    return HTMLReportExporter().from_notebook_node(new_notebook(cells=cells))[0]


def test_the_counting_server_notices_a_request_and_the_console_is_read(server, tmp_path):
    server.pages["/page"] = f'<img src="{server.root}/seen.png"><script>console.error("heard")</script>'
    done = visit(server.root + "/page", tmp_path)
    assert "/seen.png" in server.asked and re.search("CONSOLE.*heard", done.stderr)


def test_the_page_asks_only_for_itself(server, tmp_path):
    """It does not even try: what its policy forbids would be said on the console."""
    server.pages["/report"] = hostile_report(server.root)
    done = visit(server.root + "/report", tmp_path)
    assert "<math" in done.stdout and server.asked == ["/report"]
    assert "CONSOLE" not in done.stderr
