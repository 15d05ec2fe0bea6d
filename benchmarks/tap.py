"""`tap/*`: TCP of the kernel's own stack through both TAPs and the card between them; the yardstick is a bare relay (relay.py).

namespace A - TAP - switch of the embedded host - netvsp - netvsc - TAP - namespace B, no offload. Host and driver are threads of a child
process, as the relay is one; all sleep except while they are measured.
"""

from __future__ import annotations

import subprocess
import sys
from types import TracebackType
from typing import Self

from benchmarks.harness import Bar, Figures, Run, bench
from benchmarks.machine import ROOT
from benchmarks.relayed import SLICE, RelayedTaps
from vfio_vmbus.errors import UnavailableError

BARS = {1500: Bar("value", at_least=2.0), 9000: Bar("value", at_least=6.0)}


class CardTaps:
    """The demonstration's stage at one MTU (bytes), in a process of its own. A context manager."""

    def __init__(self, mtu: int) -> None:
        self._mtu = mtu

    def __enter__(self) -> Self:
        program = [sys.executable, "-m", "benchmarks.tap", str(self._mtu)]
        self._process = subprocess.Popen(
            program, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True
        )
        self.gbit_per_s(0.1)  # compiled, neighbours found, both ends running
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        with self._process:
            assert self._process.stdin is not None
            self._process.stdin.close()

    def gbit_per_s(self, seconds: float = SLICE) -> float:
        """TCP payload through the card in Gbit/s, one connection, counted where it arrives."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        print(seconds, file=self._process.stdin, flush=True)
        answer = self._process.stdout.readline()
        if not answer or answer.startswith("unavailable"):
            raise UnavailableError(answer.partition(" ")[2].strip() or "the child that drives the card ended")
        return float(answer)


def _serve(mtu: int) -> None:
    """The child: a line with seconds comes in, a line with Gbit/s goes out."""
    from vfio_vmbus.demo.stage import stage

    try:
        with stage(mtu) as on:
            port = on.right.tcp_serve()
            for line in sys.stdin:
                print(on.left.tcp_send(on.right.address, port, float(line)).gbit_per_s, flush=True)
    except UnavailableError as error:
        print(f"unavailable {error}", flush=True)


def _bench(mtu: int) -> None:
    @bench(f"tap/{mtu}", unit="Gbit/s", bar=BARS[mtu])
    def tap(run: Run) -> Figures:
        card = run.shared(lambda: CardTaps(mtu))
        relay = run.shared(lambda: RelayedTaps(mtu))
        return run.measure_in_turn({"ours": card.gbit_per_s, "yardstick": relay.gbit_per_s}).figures()


if __name__ == "__main__":
    _serve(int(sys.argv[1]))
else:
    for _mtu in BARS:
        _bench(_mtu)
