"""Python imports this at its start where the folder is on PYTHONPATH: it notes what the process asks the network for.

Each line of the file $TRANSFORMNET_AUDIT is one event: process, event, arguments. Kernels and loader processes inherit
the environment, and so are noted too. What libraries in C ask by themselves passes it by; see test_habits.py for that.
"""

import os
import sys


def note(event: str, arguments: tuple) -> None:
    if event in WATCHED:
        # Opened anew each time: a process that was forked must not share a position in the file
        told = arguments if event.startswith("socket.get") else arguments[1:]  # the first of the others is the socket
        line = f"{os.getpid()}\t{event}\t{told!r}\n".encode()
        file = os.open(os.environ["TRANSFORMNET_AUDIT"], os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        os.write(file, line)
        os.close(file)


WATCHED = ["socket." + name for name in ("connect", "bind", "sendto", "sendmsg", "getaddrinfo", "gethostbyname")]
if "TRANSFORMNET_AUDIT" in os.environ:
    sys.addaudithook(note)
