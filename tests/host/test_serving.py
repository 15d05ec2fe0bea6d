"""Cards of an embedded host for other processes, one of which is killed at work."""

from __future__ import annotations

import errno
import os
import queue
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.vfio.raw_client import RawClient
from vfio_vmbus.channel.opening import open_device
from vfio_vmbus.drivers.netvsc.driver import Netvsc
from vfio_vmbus.errors import UsageError
from vfio_vmbus.host.embedded import EmbeddedHost
from vfio_vmbus.host.serving import HostServer
from vfio_vmbus.memory.mapping import PAGE
from vfio_vmbus.memory.shared import SharedMemory
from vfio_vmbus.testing.leaks import Stock, nothing_left
from vfio_vmbus.vfio.user.client import UserDevice
from vfio_vmbus.vfio.user.server import ServerEvent

ROOT = Path(__file__).resolve().parents[2]
PATIENCE = 60.0
DRIVER = """
import sys
from vfio_vmbus.apps.measure import measure_sending
from vfio_vmbus.channel.opening import open_device
from vfio_vmbus.drivers.netvsc.driver import Netvsc
from vfio_vmbus.vfio.user.client import UserDevice
with open_device(UserDevice(sys.argv[1], timeout=60)) as device, Netvsc(device) as nic:
    frame = bytes(6) + nic.mac + bytes(100)
    measure_sending(nic, frame, 0.1)
    print("at work", flush=True)
    measure_sending(nic, frame, 600)
"""


@contextmanager
def driver_at_work(path: Path) -> Iterator[subprocess.Popen[str]]:
    """netvsc in a process of its own, sending as fast as it can."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", DRIVER, str(path)]
    with subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "at work\n"
            yield process
        finally:
            process.kill()


def test_a_driver_that_is_killed_at_work_leaves_nothing_and_its_card_is_free(tmp_path: Path) -> None:
    events: queue.SimpleQueue[ServerEvent] = queue.SimpleQueue()
    with nothing_left(objects=False), EmbeddedHost(poll="interrupt") as host, HostServer(host, events=events.put) as server:
        nic = host.add_nic()
        host.switch.add_sink()
        server.listen(tmp_path / "nic", nic)
        assert events.get(timeout=PATIENCE).kind == "listening"
        before = Stock.take()
        for _ in range(2):
            with driver_at_work(tmp_path / "nic") as process:
                attached = events.get(timeout=PATIENCE)
                assert (attached.kind, attached.peer and attached.peer.pid) == ("attached", process.pid)
                assert nic.port is not None
                process.kill()
                start = time.monotonic()
                assert events.get(timeout=PATIENCE).kind == "detached"
                assert time.monotonic() - start < 10  # a second, and what a loaded machine makes of it
            assert nic.port is None
            left = Stock.take().beyond(before)
            left.pop("registered", None)
            assert left == {}
        with open_device(UserDevice(tmp_path / "nic", timeout=PATIENCE)) as device, Netvsc(device) as mine:
            assert mine.mac == nic.mac


def test_a_card_that_is_driven_in_this_process_is_busy(tmp_path: Path) -> None:
    with nothing_left(objects=False), EmbeddedHost(poll="interrupt") as host, HostServer(host) as server:
        nic = host.add_nic()
        server.listen(tmp_path / "nic", nic)
        with host.attach(nic), RawClient(tmp_path / "nic") as client:
            assert client.greeted == (errno.EBUSY, b"")
        with RawClient(tmp_path / "nic") as client:
            assert client.greeted[0] == 0
            with pytest.raises(UsageError, match="client already"):
                host.attach(nic)


def test_limits_of_memory_are_the_servers_or_the_attachs(tmp_path: Path) -> None:
    with nothing_left(objects=False), EmbeddedHost(poll="interrupt") as host, SharedMemory(4 * PAGE) as memory:
        nic = host.add_nic()
        with HostServer(host, max_maps=2, max_bytes=3 * PAGE) as server:
            server.listen(tmp_path / "nic", nic)
            with RawClient(tmp_path / "nic") as client:
                codes = [client.map(n << 32, pages * PAGE, memory.fd) for n, pages in enumerate((4, 2, 2, 1, 1), 1)]
                assert codes == [errno.ENOSPC, 0, errno.ENOSPC, 0, errno.ENOSPC]
        with host.attach(nic, max_maps=1) as device:
            assert device.function.domain.max_maps == 1


def test_the_end_of_the_host_is_that_of_its_server_and_its_clients(tmp_path: Path) -> None:
    with nothing_left(objects=False):
        host = EmbeddedHost(poll="interrupt")
        server = HostServer(host)
        server.listen(tmp_path / "nic", host.add_nic())
        with RawClient(tmp_path / "nic") as client, SharedMemory(PAGE) as memory:
            assert client.map(1 << 32, PAGE, memory.fd) == 0
            host.close()
            assert client.ended()
        assert not (tmp_path / "nic").exists()
        server.close()
