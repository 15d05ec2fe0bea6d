"""A host in a process of its own: `python -m tests.vfio.served_host FOLDER`.

It serves the cards "left" and "right" of one switch at sockets of these names in FOLDER, says "ready", and answers each line on its
standard input with what it has open, as JSON. It ends when that ends.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from vfio_vmbus.host.embedded import EmbeddedHost
from vfio_vmbus.host.serving import HostServer
from vfio_vmbus.testing.leaks import Stock

CARDS = ("left", "right")
ROOT = Path(__file__).resolve().parents[2]


def main(folder: str) -> None:
    with EmbeddedHost(poll="interrupt") as host, HostServer(host) as server:
        for name in CARDS:
            server.listen(Path(folder) / name, host.add_nic(name))
        print("ready", flush=True)
        for _ in sys.stdin:
            stock = Stock.take()
            counts = {"descriptors": stock.descriptors, "mappings": stock.mappings, "threads": stock.threads}
            print(json.dumps({what: found.total() for what, found in counts.items()}), flush=True)


class OtherProcess:
    """The host as the other process sees it."""

    def __init__(self, process: subprocess.Popen[str], folder: Path) -> None:
        self.process = process
        self.folder = folder

    def path(self, card: str) -> Path:
        return self.folder / card

    def stock(self) -> dict[str, int]:
        """How many descriptors, mappings of shared memory and threads it has."""
        assert self.process.stdin is not None
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        return dict(json.loads(self.line()))

    def line(self) -> str:
        assert self.process.stdout is not None
        text = self.process.stdout.readline()
        assert text, f"the host ended with status {self.process.wait()}"
        return text


@contextmanager
def other_process(folder: Path) -> Iterator[OtherProcess]:
    """A host in another process, ready. Afterwards it has ended well."""
    command = [sys.executable, "-m", "tests.vfio.served_host", str(folder)]
    with subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        try:
            host = OtherProcess(process, folder)
            assert host.line() == "ready\n"
            yield host
            assert process.stdin is not None
            process.stdin.close()
            assert process.wait(60) == 0
        finally:
            process.kill()


if __name__ == "__main__":
    main(sys.argv[1])
