"""A web server of the guest's own, behind its own TCP/IP stack: busybox's."""

from __future__ import annotations

import hashlib
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

PORT = 8080
_WAIT_SECONDS = 240.0


def main(report: Callable[[Any], None], busybox: str, interface: str, address: str, size: int) -> None:
    """Wait for an interface, give it an IPv4 address, serve a file of `size` bytes there until stopped. Reports the file's SHA-256."""
    deadline = time.monotonic() + _WAIT_SECONDS
    while not Path("/sys/class/net", interface).exists():
        if time.monotonic() > deadline:
            raise TimeoutError(f"no interface {interface} within {_WAIT_SECONDS:.0f} s")
        time.sleep(0.05)
    for words in (["addr", "add", address, "dev", interface], ["link", "set", interface, "up"]):
        subprocess.run([busybox, "ip", *words], check=True)
    folder = Path("/dev/shm/www")
    folder.mkdir(exist_ok=True)
    body = Random(7).randbytes(size)
    (folder / "file").write_bytes(body)
    server = subprocess.Popen([busybox, "httpd", "-f", "-p", str(PORT), "-h", str(folder)])
    try:
        report(hashlib.sha256(body).hexdigest())
        server.wait()
    finally:
        server.kill()
        server.wait()
