"""The host in a process of its own: what it says when asked wrongly, and what is seen when it dies."""

from __future__ import annotations

import os
import signal
import socket

import pytest

from vfio_vmbus.demo import messages
from vfio_vmbus.demo.hostprocess import HostProcess, host_process
from vfio_vmbus.drivers.netvsc.driver import Netvsc
from vfio_vmbus.errors import ClosedError, LocalError, PeerError, UsageError
from vfio_vmbus.testing.leaks import nothing_left

MAC = bytes.fromhex("02000000aa01")


def test_a_card_is_driven_from_here_and_the_process_ends_with_us() -> None:
    with nothing_left(objects=False), host_process(MAC) as host:
        with host.attach() as device, Netvsc(device) as nic:
            assert nic.mac == MAC
            assert nic.queue.send([b"\xff" * 6 + MAC + bytes(50)]) == 1
        with host.attach() as device:  # free for the next one
            assert device.isolation
        pid = host.pid
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


def test_a_host_that_dies_is_an_error_here_and_nothing_hangs() -> None:
    with nothing_left(objects=False), host_process(MAC) as host, host.attach() as device, Netvsc(device) as nic:
        os.kill(host.pid, signal.SIGKILL)
        with pytest.raises(LocalError, match=r"ended \(status -9\)"):
            host.watch()
        nic._rpc._timeout = 0.5  # nobody is there who could answer
        with pytest.raises((ClosedError, PeerError)):
            nic.query(0x00010101)


@pytest.mark.parametrize(
    ("request_", "says"),
    [
        (messages.SetUp(MAC), "runs already"),
        (messages.Attach(attacker=True), "a socket has to come along"),
        (messages.Replay("/nowhere/at/all", 1.0), "nowhere"),
    ],
    ids=["twice", "no-socket", "no-file"],
)
def test_what_it_refuses_it_refuses_in_words(shared: HostProcess, request_: messages.Request, says: str) -> None:
    with pytest.raises((UsageError, LocalError), match=says):
        shared._call(request_, messages.Done)


def test_the_judge_wants_an_attacker_first(shared: HostProcess) -> None:
    with pytest.raises(UsageError, match="client"):
        shared.watch()


def test_only_sockets_are_attached(shared: HostProcess) -> None:
    reader, writer = os.pipe()
    with pytest.raises((UsageError, LocalError)):
        shared._call(messages.Attach(attacker=True), messages.Done, reader)
    os.close(reader)
    os.close(writer)
    ours, theirs = socket.socketpair()
    shared._call(messages.Attach(attacker=True), messages.Done, theirs.fileno())
    theirs.close()
    ours.close()


@pytest.fixture(scope="module")
def shared():
    with host_process(MAC) as host:
        yield host
