"""The TAP port, over sockets and, where they can be had, over TAP devices of the kernel."""

from __future__ import annotations

import ctypes
import errno
import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from switch_rig import Station, close_all, frame, mac, step

from vfio_vmbus.host.frames import FRAME, mac_value
from vfio_vmbus.host.switch.switch import Switch
from vfio_vmbus.host.switch.tap import STAGED, tap_deliver
from vfio_vmbus.memory.block import Block

CLONE_NEWUSER, CLONE_NEWNET = 0x10000000, 0x40000000
FORBIDDEN = 77

A, B, C = mac(1), mac(2), mac(3)


def test_more_frames_than_a_burst_keep_their_order() -> None:
    switch = Switch()
    left, right = Station(switch), Station(switch)
    frames = [frame(A, B, 60 + number % 7, number) for number in range(STAGED + 5)]
    left.send(*frames)
    assert step(switch) == len(frames)
    assert right.received() == frames
    close_all(switch, [left, right])


def test_runs_to_several_targets_in_one_burst_keep_their_order() -> None:
    switch = Switch()
    left, middle, right = (Station(switch) for _ in range(3))
    middle.send(frame(B, A))
    right.send(frame(C, A))
    step(switch)
    for station in (left, middle, right):
        station.received()
    frames = [frame(A, (B, B, C, b"\xff" * 6)[number % 4], 60, number) for number in range(40)]
    left.send(*frames)
    step(switch)
    assert middle.received() == [data for data in frames if data[:6] != C]
    assert right.received() == [data for data in frames if data[:6] != B]
    close_all(switch, [left, middle, right])


@pytest.mark.parametrize("limit", [1514, 1600])
def test_the_longest_frame_passes_and_a_longer_one_is_counted(limit: int) -> None:
    switch = Switch()
    left, right = Station(switch, max_frame=limit), Station(switch)
    frames = [frame(A, B, size, size) for size in (limit, limit + 1, limit + 100, limit - 1, 9216)]
    left.send(*frames)
    right.send(frame(B, A, limit), frame(B, A, limit + 1))
    step(switch)
    assert right.received() == [frames[0], frames[3]]
    assert left.received() == [frame(B, A, limit)]
    assert left.port.counters().too_long == 4, "three from it, one for it"
    close_all(switch, [left, right])


def test_frames_leave_with_the_addresses_that_were_checked() -> None:
    """As if a guest had changed its frame once the switch had looked at it."""
    switch = Switch()
    station = Station(switch)
    memory, table = Block("u1", 64), Block(FRAME)
    memory.array[:60] = np.frombuffer(frame(C, C), np.uint8)
    table.array[0] = (memory.address, 60, 0, 0, mac_value(B), mac_value(A))
    assert tap_deliver(switch._records.address, table.address, 1) == 1
    assert station.received() == [B + A + frame(C, C)[12:]]
    close_all(switch, [station])


def test_an_error_of_one_write_does_not_lose_the_frames_behind_it() -> None:
    switch = Switch()
    left = Station(switch)
    mine, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
    with mine, theirs:
        theirs.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1)
        port = switch.add_tap(theirs.fileno())
        left.send(frame(A, B, 9000, 1), frame(A, B, 60, 2))
        step(switch)
        mine.setblocking(False)
        assert mine.recv(65536) == frame(A, B, 60, 2)
        counters = port.counters()
        assert (counters.tx_frames, counters.errors, counters.no_room, port.last_error) == (1, 1, 0, errno.EMSGSIZE)
    close_all(switch, [left])


def own_network() -> None:
    """In the child, before it starts: a user namespace, and a network namespace that it governs."""
    user = os.geteuid()
    if ctypes.CDLL(None).unshare(CLONE_NEWUSER | CLONE_NEWNET) != 0:
        os._exit(FORBIDDEN)
    Path("/proc/self/uid_map").write_text(f"0 {user} 1")


def test_tap_devices_of_the_kernel() -> None:
    if not os.access("/dev/net/tun", os.R_OK | os.W_OK):
        pytest.skip("no access to /dev/net/tun here")
    script = [sys.executable, Path(__file__).parent / "tap_script.py"]
    ended = subprocess.run(script, capture_output=True, text=True, timeout=300, check=False, preexec_fn=own_network)
    if ended.returncode == FORBIDDEN:
        pytest.skip("user and network namespaces are forbidden here")
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, "held\n", "")
