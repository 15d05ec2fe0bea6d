"""`region/read` and `attach/first-frame`: what a driver in a process of its own pays for its host being in another, by vfio-user."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from benchmarks.harness import Bar, Figures, Run, bench
from benchmarks.hosts import There
from vfio_vmbus.channel.opening import open_device
from vfio_vmbus.drivers.netvsc.driver import Netvsc
from vfio_vmbus.errors import UnavailableError
from vfio_vmbus.vfio.device import BAR0_REGION, Region
from vfio_vmbus.vfio.user.client import UserDevice

READS = 5000  # of one sample
REQUEST, REPLY = 32, 36  # bytes that a read of a register sends and receives
PATIENCE = 10.0


@bench("region/read", unit="us", bar=Bar("ratio", at_most=1.5))
def region_read(run: Run) -> Figures:
    """A register of 32 bits is read, 5000 times one after the other; the yardstick sends as many bytes to and fro between two processes of
    bare Python."""
    there = run.shared(There)
    with UserDevice(there.path) as device, ping_pong() as echo:
        bar = device.region(BAR0_REGION)
        samplers = {"ours": lambda: _microseconds(bar), "yardstick": lambda: _bare_microseconds(echo)}
        for sampler in samplers.values():
            sampler()
        return run.measure_in_turn(samplers).figures()


def _microseconds(bar: Region) -> float:
    read = bar.read
    begin = time.perf_counter()
    for _ in range(READS):
        read(0, 4)
    return (time.perf_counter() - begin) / READS * 1e6


def _bare_microseconds(echo: socket.socket) -> float:
    request, buffer = bytes(REQUEST), bytearray(1 << 16)
    begin = time.perf_counter()
    for _ in range(READS):
        echo.send(request)
        echo.recv_into(buffer)
    return (time.perf_counter() - begin) / READS * 1e6


@contextmanager
def ping_pong() -> Iterator[socket.socket]:
    """A socket to a process that answers every message."""
    ours, theirs = socket.socketpair()
    child = os.fork()
    if child == 0:
        with suppress(BaseException):
            ours.close()
            reply, buffer = bytes(REPLY), bytearray(1 << 16)
            while theirs.recv_into(buffer):
                theirs.send(reply)
        os._exit(0)
    theirs.close()
    try:
        yield ours
    finally:
        ours.close()
        os.waitpid(child, 0)


@bench("attach/first-frame", unit="s", bar=Bar("value", at_most=0.5))
def attach(run: Run) -> Figures:
    """From connect() to the first frame received, with the host running, frames coming, and kernels compiled."""
    there = run.shared(There)
    with there.generator(64):
        _first_frame(there)
        return run.measure_in_turn({"ours": lambda: _first_frame(there)}).figures()


def _first_frame(there: There) -> float:
    begin = time.perf_counter()
    with open_device(UserDevice(there.path)) as device, Netvsc(device) as nic:
        while not len(nic.queue.rx_burst()):
            if time.perf_counter() - begin > PATIENCE:
                raise UnavailableError(f"no frame came within {PATIENCE:g} s: other processes have the cores")
        return time.perf_counter() - begin
