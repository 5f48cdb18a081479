"""What an import must not do, and what the commands must not ask the network for."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import jupyterlab
import pytest
from jupyterlab.labapp import LabApp

ROOT = Path(__file__).resolve().parents[1]

# Imports what it is given and prints as JSON what that did: [event, arguments]
WATCH = """
import json, os, sys

done = []
WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
CHANGES = ("os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.link", "os.symlink", "os.truncate", "os.chmod")
PROCESSES = ("subprocess.Popen", "os.system", "os.exec", "os.fork", "os.forkpty", "os.posix_spawn", "os.spawn")

def watch(event, arguments):
    if event == "open" and arguments[2] & WRITES and arguments[0] != os.devnull:
        done.append([event, str(arguments[0])])
    elif event.startswith(("socket.", "urllib.", "http.", "ftplib.", "smtplib.")) or event in CHANGES + PROCESSES:
        done.append([event, repr(arguments)])

sys.addaudithook(watch)
import importlib, pkgutil
import transformnet_lib

if sys.argv[1] == "all":
    for module in pkgutil.walk_packages(transformnet_lib.__path__, "transformnet_lib."):
        importlib.import_module(module.name)
    for name in transformnet_lib.__all__:
        getattr(transformnet_lib, name)
elif sys.argv[1] == "a socket, a file, a folder and a process":  # to see that they are noted
    import socket, subprocess
    socket.socket().close()
    open("file", "w").close()
    os.mkdir("folder")
    subprocess.run([sys.executable, "--version"], stdout=subprocess.DEVNULL)
print(json.dumps(done))
"""


def imported(what: str, home: Path) -> list[list[str]]:
    """What importing did in a process of its own, in an empty home; bytecode is not written, as on a read-only disk."""
    home.mkdir(exist_ok=True)
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("XDG_", "MPL"))}
    environment = kept | {"HOME": str(home), "PYTHONDONTWRITEBYTECODE": "1", "PYTHONPATH": str(ROOT)}
    arguments = [sys.executable, "-W", "error", "-c", WATCH, what]
    done = subprocess.run(arguments, cwd=home, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_the_watch_notices_a_socket_a_file_a_folder_and_a_process(tmp_path):
    events = [event for event, _ in imported("a socket, a file, a folder and a process", tmp_path)]
    assert {"socket.__new__", "open", "os.mkdir", "subprocess.Popen"} <= set(events)


def test_importing_the_library_opens_no_socket_and_writes_no_file(tmp_path):
    assert imported("the package", tmp_path / "home") == []
    assert list((tmp_path / "home").iterdir()) == []


@pytest.mark.slow
def test_importing_every_module_opens_no_socket_and_writes_no_file(tmp_path):
    events = imported("all", tmp_path / "home")
    # On a machine where it never ran, Matplotlib notes which fonts there are, once, in folders of its own; it asks
    # fc-list for them, and Python's ctypes asks ldconfig where a library lies.
    made = [".config", ".config/matplotlib", ".cache", ".cache/matplotlib"]
    allowed = [*(f"('{tmp_path}/home/{folder}', " for folder in made), "('fc-list', ", "('/sbin/ldconfig', "]
    fonts = f"{tmp_path}/home/.cache/matplotlib/fontlist-"
    assert [arguments for _, arguments in events if not arguments.startswith((*allowed, fonts, f"('{fonts}"))] == []
    left = [path.relative_to(tmp_path / "home").as_posix() for path in (tmp_path / "home").rglob("*")]
    assert len([name for name in left if name not in made]) <= 1  # the list of fonts


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("strace"), reason="no strace on the PATH")
def test_no_system_call_of_a_stage_reaches_another_machine(tmp_path):
    log = tmp_path / "calls.log"
    done = subprocess.run(
        ["strace", "-f", "--seccomp-bpf", "-e", "trace=connect,bind,sendto,sendmsg,sendmmsg", "-o", log,
         Path(sys.executable).parent / "transformnet", "train", "--run-dir", "run", "--device", "cpu",
         "--data", "photos", "--limit", "300", "--epochs", "1"],
        cwd=tmp_path, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True,
    )  # fmt: skip
    if "strace: " in done.stderr:
        pytest.skip(f"strace may not watch processes here: {done.stderr.splitlines()[0]}")
    assert done.returncode == 0, done.stderr
    addressed = [line for line in log.read_text().splitlines() if "AF_INET" in line]
    assert len(addressed) > 10  # the notebook's kernel and what steers it
    assert [line for line in addressed if '"127.0.0.1"' not in line and '"::1"' not in line] == []


@pytest.mark.skipif(sys.platform == "win32", reason="make is not there")
def test_make_lab_asks_no_other_host_for_news_updates_and_extensions(tmp_path):
    done = subprocess.run(["make", "-n", "lab"], cwd=ROOT, capture_output=True, text=True)
    (line,) = [line for line in done.stdout.splitlines() if "jupyter lab" in line]
    app = LabApp()  # a name that it does not know would only be warned of
    app.parse_command_line(line.split()[2:-1])
    assert app.news_url is None
    assert app.check_for_updates_class is jupyterlab.NeverCheckForUpdate
    assert app.extension_manager == "readonly"
