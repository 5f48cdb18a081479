"""JupyterLab and TensorBoard in a real browser, as users run them. Skipped where no Chromium is installed."""

import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import pytest
from playwright.sync_api import expect, sync_playwright

from transformnet_lib.images import decode_image
from transformnet_lib.report import NOTEBOOKS, ROOT
from transformnet_lib.run import reference_run

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = [pytest.mark.slow, pytest.mark.skipif(not BROWSER, reason="no Chromium on the PATH")]

BIN = Path(sys.executable).parent
FEW = {"batch_sizes": "[64]", "small_batch_sizes": "[1]", "sizes": "[500]", "seeds": "1", "limit": "600"}
SECONDS = 120  # that anything may take, on a machine busy with other things
QUIET = {  # JupyterLab's settings: no questions about news, and all cells in the page, also those out of sight
    "@jupyterlab/apputils-extension/notification.jupyterlab-settings": {"fetchNews": "false", "checkForUpdates": False},
    "@jupyterlab/notebook-extension/tracker.jupyterlab-settings": {"windowingMode": "none"},
}


@pytest.fixture(scope="module")
def browser():
    expect.set_options(timeout=1000 * SECONDS)
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
        yield chromium
        chromium.close()


@pytest.fixture
def page(browser):
    page = browser.new_page(viewport={"width": 1200, "height": 1400})
    page.set_default_timeout(1000 * SECONDS)
    yield page
    page.close()


def wait_for(what, seconds=SECONDS):
    """Poll `what` until it gives something true, and return that."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        if found := what():
            return found
        time.sleep(0.1)
    raise TimeoutError(what)


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    """A JupyterLab of its own on a copy of the notebooks, not executed, with less to do: its address and token."""
    home = tmp_path_factory.mktemp("lab")
    notebooks = home / "notebooks"
    notebooks.mkdir()
    for source in NOTEBOOKS.glob("*.ipynb"):
        notebook = nbformat.read(source, as_version=4)
        for cell in notebook.cells:
            if cell.cell_type == "code":
                cell.outputs, cell.execution_count = [], None
            if "parameters" in cell.metadata.get("tags", []):
                for parameter, value in FEW.items():
                    cell.source = re.sub(rf"(?m)^({parameter}: .*? = ).*$", rf"\g<1>{value}", cell.source)
        nbformat.write(notebook, notebooks / source.name)
    for name, settings in QUIET.items():
        path = home / "settings" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(settings))
    folders = {
        "JUPYTER_CONFIG_DIR": "config",
        "JUPYTER_DATA_DIR": "data",
        "JUPYTER_RUNTIME_DIR": "runtime",
        "JUPYTERLAB_SETTINGS_DIR": "settings",
        "JUPYTERLAB_WORKSPACES_DIR": "workspaces",
        "IPYTHONDIR": "ipython",
        "TMPDIR": "tmp",  # where TensorBoard notes which servers there are
    }
    (home / "tmp").mkdir()
    environment = os.environ | {name: str(home / folder) for name, folder in folders.items()} | {"OMP_NUM_THREADS": "1"}
    command = [BIN / "jupyter", "lab", "--no-browser", "--allow-root", f"--ServerApp.root_dir={notebooks}"]
    with (home / "log").open("w") as log:
        server = subprocess.Popen(command, cwd=notebooks, env=environment, stdout=log, stderr=log)
        try:
            info = json.loads(wait_for(lambda: list((home / "runtime").glob("jpserver-*.json")))[0].read_text())
            yield info["url"], info["token"]
        finally:
            server.terminate()  # its kernels end with it
            try:
                server.wait(30)
            except subprocess.TimeoutExpired:
                server.kill()


def open_notebook(page, lab, name) -> None:
    """Open a notebook in JupyterLab and wait for its kernel; kernels of other tests are shut down."""
    url, token = lab
    authorised = {"headers": {"Authorization": f"token {token}"}}
    for session in page.request.get(f"{url}api/sessions", **authorised).json():
        page.request.delete(f"{url}api/sessions/{session['id']}", **authorised)
    page.goto(f"{url}lab/tree/{name}.ipynb?token={token}&reset")
    page.locator(".jp-Notebook .jp-CodeCell").first.wait_for()
    page.get_by_text("Python 3 (ipykernel) | Idle").wait_for()


def run_all(page) -> list[str]:
    """Run > Run All Cells; wait until every code cell has run or one has failed, and give what failed or warned."""
    page.get_by_role("menuitem", name="Run", exact=True).click()
    page.get_by_role("menuitem", name="Run All Cells", exact=True).click()
    page.wait_for_function(  # all cells wait at once, [*]; after one that fails the others are [ ] again
        """() => {
            const cells = [...document.querySelectorAll(".jp-CodeCell .jp-InputPrompt")];
            const prompts = cells.map(cell => cell.textContent).join();
            return /\\d/.test(prompts) && !prompts.includes("*");
        }"""
    )
    prompts = page.locator(".jp-CodeCell .jp-InputPrompt").all_inner_texts()
    said = page.locator('[data-mime-type="application/vnd.jupyter.stderr"]').all_inner_texts()  # progress bars too
    unrun = [prompt for prompt in prompts if not re.search(r"\d", prompt)]
    return unrun + [text for text in said if re.search("Error|Warning|Traceback", text)]


@pytest.mark.parametrize("name", [path.stem for path in sorted(NOTEBOOKS.glob("*.ipynb")) if path.stem != "explore"])
def test_the_notebook_runs_in_jupyterlab(page, lab, name):
    open_notebook(page, lab, name)
    assert run_all(page) == []
    # The idea in thirty lines draws nothing
    assert (page.locator(".jp-RenderedSVG img, .jp-RenderedSVG svg").count() > 0) is (name != "three_weights")


def test_explore_follows_the_hand(page, lab):
    open_notebook(page, lab, "explore")
    assert run_all(page) == []

    pictures = page.locator(".jp-OutputArea-output img.widget-image")
    output = pictures.nth(2)  # after input and ground truth
    red = page.locator(".widget-slider", has_text="red").get_by_role("slider")

    before, place = output.screenshot(), output.get_attribute("src")
    red.press("PageUp")
    expect(output).not_to_have_attribute("src", place)
    assert output.screenshot() != before

    page.get_by_label("weights of").select_option("ground truth")
    expect(page.get_by_text("MSE of this image")).to_contain_text("×10⁻¹⁶")

    landscape = pictures.nth(4)
    place = landscape.get_attribute("src")
    page.locator(".widget-slider", has_text="seed").get_by_role("slider").press("ArrowRight")
    expect(landscape).not_to_have_attribute("src", place)

    def upload(file) -> None:
        with page.expect_file_chooser() as chooser:
            page.get_by_role("button", name="your image").click()
        chooser.value.set_files(file)

    upload({"name": "notes.txt", "mimeType": "text/plain", "buffer": b"no picture"})
    expect(page.get_by_text("notes.txt: not a readable image")).to_be_visible()
    upload(ROOT / "report/first-page.png")
    height, width = decode_image(ROOT / "report/first-page.png").shape[1:]
    expect(page.get_by_text(f"input, {height}×{width}")).to_be_visible()

    page.get_by_role("button", name="start TensorBoard").click()
    expect(page.frame_locator("iframe").get_by_text("train_mse").first).to_be_visible()


def test_tensorboard_shows_the_curves(page):
    command = [BIN / "tensorboard", "--logdir", reference_run(), "--port", "0"]
    server = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    try:
        address = next(match[0] for line in server.stderr if (match := re.search(r"http://\S+", line)))
        page.goto(address)
        for tag in ("train_mse", "val_mse", "epoch_seconds"):
            expect(page.get_by_text(tag, exact=True).first).to_be_visible()
        expect(page.locator("line-chart").first).to_be_visible()
    finally:
        server.terminate()
        server.communicate(timeout=30)


def test_nbconvert_shows_pictures_in_place_of_widgets(page, tmp_path):
    command = [BIN / "jupyter", "nbconvert", "--to", "html", NOTEBOOKS / "explore.ipynb", "--output-dir", tmp_path]
    subprocess.run(command, check=True, capture_output=True, timeout=SECONDS)
    page.goto((tmp_path / "explore.html").as_uri())
    drawn = page.locator("img[src^='data:image/svg']").evaluate_all(
        "images => images.map(image => image.naturalWidth > 0)"
    )
    assert drawn == [True] * 5
    assert page.get_by_text("A Jupyter widget could not be displayed").count() == 0
