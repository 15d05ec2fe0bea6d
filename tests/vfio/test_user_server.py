"""The vfio-user server: who may come and how many, what a client may do, and what is left when it goes, however it goes."""

from __future__ import annotations

import asyncio
import os
import socket
import stat
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from itertools import pairwise
from pathlib import Path

import pytest

from tests.vfio.raw_client import PATIENCE, RawClient
from tests.vfio.user_rig import GREETING
from vfio_vmbus.errors import UsageError
from vfio_vmbus.memory.mapping import PAGE
from vfio_vmbus.memory.shared import SharedMemory
from vfio_vmbus.testing import edu
from vfio_vmbus.testing.edu import Edu
from vfio_vmbus.testing.leaks import Stock, nothing_left
from vfio_vmbus.vfio.user.connection import _MESSAGES as TURN
from vfio_vmbus.vfio.user.connection import ServerLimits
from vfio_vmbus.vfio.user.listener import Admission, Peer
from vfio_vmbus.vfio.user.server import MAX_WAITING, ServerEvent, UserServer
from vfio_vmbus.wire import vfio_user as wire

IOVA = 1 << 32
EBUSY, ENOSPC = 16, 28


class Served:
    """A server of `edu` devices in a thread."""

    def __init__(self, folder: Path, loop: asyncio.AbstractEventLoop, server: UserServer, events: list[ServerEvent]) -> None:
        self.folder = folder
        self.loop = loop
        self.server = server
        self.events = events

    def on_loop(self, call: Callable[[], object]) -> object:
        async def run() -> object:
            return call()

        return asyncio.run_coroutine_threadsafe(run(), self.loop).result(PATIENCE)

    def client(self, name: str = "a") -> RawClient:
        return RawClient(self.folder / name)

    def next_client(self, name: str = "a") -> RawClient:
        """One that comes when the one before has gone."""
        deadline = time.monotonic() + PATIENCE
        while True:
            client = self.client(name)
            if client.greeted[0] == 0:
                return client
            assert (client.greeted[0], time.monotonic() < deadline) == (EBUSY, True)
            client.sock.close()

    def wait_for(self, kind: str, count: int = 1) -> list[ServerEvent]:
        deadline = time.monotonic() + PATIENCE
        while len(found := [event for event in self.events if event.kind == kind]) < count:
            assert time.monotonic() < deadline, self.events
            time.sleep(0.005)
        return found


@contextmanager
def serving(
    folder: Path,
    *names: str,
    limits: ServerLimits | None = None,
    max_maps: int = 65535,
    admission: Admission | None = None,
) -> Iterator[Served]:
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    events: list[ServerEvent] = []
    with nothing_left(objects=False):
        thread.start()

        async def begin() -> UserServer:
            server = UserServer(limits=limits, events=events.append)
            if admission is not None:
                server.admission = admission
            for name in names or ("a",):
                server.listen(folder / name, lambda client: Edu(client, max_maps=max_maps))
            return server

        async def end() -> None:
            server.close()
            await asyncio.sleep(0)

        server = asyncio.run_coroutine_threadsafe(begin(), loop).result(PATIENCE)
        try:
            yield Served(folder, loop, server, events)
        finally:
            asyncio.run_coroutine_threadsafe(end(), loop).result(PATIENCE)
            loop.call_soon_threadsafe(loop.stop)
            thread.join()
            loop.close()
        assert server.clients == 0
        assert not any((folder / name).is_socket() for name in names or ("a",))


def beyond(before: Stock) -> dict[str, object]:
    """What is open now and was not then. Private memory goes with the next collection of garbage."""
    more = Stock.take().beyond(before)
    more.pop("registered", None)
    return more


def alive(client: RawClient) -> bool:
    return client.read(0, edu.REG_ID, 4) == edu.ID


# Who may come.


def test_sockets_are_the_owners_alone(tmp_path: Path) -> None:
    with serving(tmp_path) as served:
        assert stat.S_IMODE(os.stat(tmp_path / "a").st_mode) == 0o600
        served.on_loop(lambda: served.server.listen(tmp_path / "b", Edu, mode=0o660))
        assert stat.S_IMODE(os.stat(tmp_path / "b").st_mode) == 0o660


def test_a_second_client_hears_that_the_device_is_busy(tmp_path: Path) -> None:
    with serving(tmp_path, "a", "b") as served, served.client() as first:
        for _ in range(3):
            with served.client() as second:
                assert second.greeted == (EBUSY, b"")
                assert second.ended()
        with served.client("b") as other:
            assert alive(other)
        assert alive(first)
        first.sock.close()
        with served.next_client() as next_one:
            assert alive(next_one)


def test_who_says_nothing_holds_up_nobody(tmp_path: Path) -> None:
    with serving(tmp_path) as served, ExitStack() as stack:
        silent = [stack.enter_context(RawClient(tmp_path / "a", greeting=b"")) for _ in range(MAX_WAITING - 1)]
        silent[0].sock.sendall(GREETING[:17])
        with served.client() as client:
            assert alive(client)
            stack.enter_context(RawClient(tmp_path / "a", greeting=b""))  # the first place is free again
            with RawClient(tmp_path / "a", greeting=b"") as too_many:
                assert too_many.ended()
            assert "VERSION" in served.wait_for("refused")[0].reason
            silent[0].sock.sendall(GREETING[17:])
            assert silent[0].answer()[0] == EBUSY


@pytest.mark.parametrize(
    ("uid", "uids", "admitted"),
    [
        (0, (), True),
        (os.geteuid(), (), True),
        (12345, (), False),
        (12345, (12345,), True),
        (12345, (12346,), False),
        (65534, (), False),
    ],
)
def test_admission_is_by_user(uid: int, uids: tuple[int, ...], admitted: bool) -> None:
    assert Admission(frozenset(uids)).admits(Peer(1, uid)) is admitted


def test_the_kernel_says_who_a_client_is() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        assert Peer.of(ours) == Peer(os.getpid(), os.geteuid())


class _NotThisProcess(Admission):
    def admits(self, peer: Peer) -> bool:
        return peer.pid != os.getpid()


def test_strangers_are_closed_and_counted_and_told_of_once(tmp_path: Path) -> None:
    """The credentials are the kernel's, of this process; the rule is another, as one process has one user only."""
    with serving(tmp_path, admission=_NotThisProcess()) as served:
        for _ in range(5):
            with RawClient(tmp_path / "a", greeting=b"") as stranger:
                assert stranger.ended()
        assert served.server.turned_away == 5
        (event,) = served.wait_for("refused")
        assert event.peer == Peer(os.getpid(), os.geteuid())


def test_a_user_of_another_number_is_a_stranger() -> None:
    if os.geteuid() != 0:
        pytest.skip("only root can become another user")
    program = (
        "import os, socket, sys\n"
        "os.setuid(12345)\n"
        "s = socket.socket(socket.AF_UNIX); s.connect(sys.argv[1]); s.settimeout(30)\n"
        "try: s.sendall(bytes.fromhex(sys.argv[2])); sys.exit(len(s.recv(100)) > 16)\n"
        "except ConnectionError: sys.exit(0)\n"
    )
    with tempfile.TemporaryDirectory() as name, serving(folder := Path(name)) as served:
        folder.chmod(0o755)
        (folder / "a").chmod(0o666)
        command = [sys.executable, "-c", program, str(folder / "a"), GREETING.hex()]
        assert subprocess.run(command).returncode == 0
        assert served.server.turned_away == 1
        served.server.admission = Admission(frozenset({12345}))
        assert subprocess.run(command).returncode == 1
        assert served.server.turned_away == 1


# Where they come from.


def test_a_socket_that_was_left_behind_is_replaced_and_no_other_file(tmp_path: Path) -> None:
    left = socket.socket(socket.AF_UNIX)
    left.bind(os.fspath(tmp_path / "a"))
    left.close()
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to(tmp_path / "a")
    with serving(tmp_path) as served:
        with served.client() as client:
            assert alive(client)
        for name, says in (
            ("a", "another server"),
            ("file", "not a socket"),
            ("link", "not a socket"),
            ("no/where", "No such file"),
            ("x" * 120, "too long"),
        ):
            with pytest.raises(UsageError, match=says) as error:
                served.on_loop(lambda name=name: served.server.listen(tmp_path / name, Edu))  # type: ignore[misc]
            assert "\n" not in str(error.value)
        with served.next_client() as client:
            assert alive(client)
    assert (tmp_path / "file").exists()


def test_a_file_that_is_anothers_by_now_stays(tmp_path: Path) -> None:
    with serving(tmp_path):
        (tmp_path / "a").rename(tmp_path / "moved")
        (tmp_path / "a").mkdir()
    (tmp_path / "a").rmdir()
    assert (tmp_path / "moved").is_socket()


def test_an_inherited_connection_is_served(tmp_path: Path) -> None:
    with serving(tmp_path) as served:
        ours, theirs = socket.socketpair()
        served.on_loop(lambda: served.server.adopt(ours.detach(), Edu))
        with RawClient(theirs) as client:
            assert alive(client)


def test_an_inherited_listening_socket_is_served(tmp_path: Path) -> None:
    with serving(tmp_path) as served:
        listening = socket.socket(socket.AF_UNIX)
        listening.bind(os.fspath(tmp_path / "inherited"))
        listening.listen()
        served.on_loop(lambda: served.server.adopt(listening.detach(), Edu))
        for _ in range(2):
            with served.next_client("inherited") as client:
                assert alive(client)


def _unconnected() -> int:
    return socket.socket(socket.AF_UNIX).detach()


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: os.open("/dev/null", os.O_RDWR), "not a socket"),
        (lambda: socket.socket(socket.AF_INET).detach(), "not a Unix stream"),
        (lambda: socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM).detach(), "not a Unix stream"),
        (_unconnected, "neither listens"),
    ],
)
def test_other_descriptors_are_not_served(tmp_path: Path, make: Callable[[], int], says: str) -> None:
    with serving(tmp_path) as served:
        fd = make()
        with pytest.raises(UsageError, match=says):
            served.on_loop(lambda: served.server.adopt(fd, Edu))
        os.close(fd)
        for closed in (fd, -1, 1 << 40):
            with pytest.raises(UsageError, match="not open"):
                served.on_loop(lambda closed=closed: served.server.adopt(closed, Edu))  # type: ignore[misc]


# What a client may do.


def test_maps_beyond_the_limit_are_refused_and_others_do_not_wait(tmp_path: Path) -> None:
    """100,000 of them, without a pause; others have their turn after some dozens of them."""
    limit, wanted = 2000, 100_000
    begin, _, end = wire.encode_request(7, wire.DMA_MAP, wire.DmaMap(flags=3, iova=IOVA, size=PAGE).pack()).partition(
        IOVA.to_bytes(8, "little")
    )
    refused = b"".join(begin + (IOVA + number * PAGE).to_bytes(8, "little") + end for number in range(limit, wanted))
    codes: list[int] = []

    def flood(me: RawClient) -> None:
        with SharedMemory(PAGE) as memory:
            codes.extend(me.map(IOVA + number * PAGE, PAGE, memory.fd) for number in range(limit))
        sender = threading.Thread(target=me.sock.sendall, args=(refused,))
        sender.start()
        codes.extend(code for (code,) in struct.iter_unpack("12xI", me.exactly(16 * (wanted - limit))))
        sender.join()

    with serving(tmp_path, "a", "b", max_maps=limit) as served, served.client("a") as one, served.client("b") as other:
        before = Stock.take().descriptors.total()
        (connection,) = served.server._places[0].connections
        turns: list[int] = []
        over = threading.Event()

        def look() -> None:
            """Once in each round of the server's loop: who else wants something has its turn as often."""
            turns.append(connection.core.refusal_count)
            if not over.is_set():
                served.server._loop.call_soon(look)

        served.server._loop.call_soon_threadsafe(look)
        flooding = threading.Thread(target=flood, args=(one,))
        flooding.start()
        while flooding.is_alive():
            assert alive(other)
        over.set()
        assert codes == [0] * limit + [ENOSPC] * (wanted - limit)
        assert max(after - now for now, after in pairwise(turns)) <= 2 * TURN
        assert Stock.take().descriptors.total() == before + 1  # the server's own of the memory
        assert one.ask(wire.DMA_UNMAP, wire.DmaUnmap(flags=wire.UNMAP_ALL).pack())[0] == 0


def test_page_by_page_a_virtual_iommu_maps_8000_and_takes_them_back(tmp_path: Path) -> None:
    pages = 8000
    with SharedMemory(pages * PAGE) as memory, serving(tmp_path) as served, served.client() as me:
        before = Stock.take()
        for number in range(pages):
            assert me.map(IOVA + number * PAGE, PAGE, memory.fd, offset=(number * 7919) % pages * PAGE) == 0
        assert alive(me)  # by now it has closed the last descriptor it was sent
        between = Stock.take()
        assert (between.descriptors - before.descriptors).total() == 1
        assert (between.mappings - before.mappings).total() == 1
        for number in range(0, pages, 2):
            assert me.unmap(IOVA + number * PAGE, PAGE) == 0
        assert me.unmap(IOVA, pages * PAGE) == 0
        assert beyond(before) == {}


def test_more_requests_than_it_may_send_are_answered_later(tmp_path: Path) -> None:
    rate, count = 200, 300
    question = wire.encode_request(1, wire.DEVICE_GET_INFO, wire.DeviceInfo().pack())
    with serving(tmp_path, "a", "b", limits=ServerLimits(max_requests=rate)) as served, served.client("b") as other:
        with served.client("a") as me:
            start = time.monotonic()
            me.sock.sendall(question * count)
            for answers in range(count):
                assert me.answer()[0] == 0
                if answers == rate:
                    assert alive(other)
            assert time.monotonic() - start >= (count - rate - 1) / rate - 0.05
            me.sock.sendall(question * count)
        served.wait_for("detached")  # long before it would have been answered


def test_a_client_that_is_not_read_from_and_dies_is_noticed(tmp_path: Path) -> None:
    with serving(tmp_path, limits=ServerLimits(max_requests=1)) as served:
        with served.client() as me:
            me.sock.sendall(wire.encode_request(1, wire.DEVICE_RESET) * 200)
        with served.next_client() as me:
            assert me.greeted[0] == 0


def test_a_client_that_reads_nothing_stops_itself_only(tmp_path: Path) -> None:
    question = wire.encode_request(1, wire.REGION_READ, wire.RegionAccess(region=7, count=256).pack())
    with serving(tmp_path, "a", "b", limits=ServerLimits(max_unsent=10_000)) as served, served.client("b") as other:
        with served.client("a") as me:
            me.sock.settimeout(0.5)
            with suppress(TimeoutError):
                while True:
                    me.sock.send(question * 100)
            assert alive(other)
            me.sock.settimeout(PATIENCE)
            for _ in range(1000):
                assert me.answer()[0] == 0
        served.wait_for("detached")
        with served.next_client("a") as me:
            assert alive(me)


def test_descriptors_that_nobody_takes_do_not_pile_up(tmp_path: Path) -> None:
    """The kernel lets a user have so many on the way; one client must not use them up for the others."""
    from vfio_vmbus.host.embedded import EmbeddedHost
    from vfio_vmbus.host.serving import HostServer

    ask = wire.encode_request(1, wire.DEVICE_GET_REGION_IO_FDS, wire.RegionIoFds(argsz=4096).pack())
    with nothing_left(objects=False), EmbeddedHost(poll="interrupt") as host, HostServer(host) as server:
        for name in ("a", "b"):
            server.listen(tmp_path / name, host.add_nic(name))
        with RawClient(tmp_path / "a") as greedy, RawClient(tmp_path / "b") as other:
            greedy.sock.sendall(ask * 100)
            for _ in range(20):
                other.sock.sendall(ask)
                data, fds, _, _ = socket.recv_fds(other.sock, 65536, 64)
                assert (len(data), len(fds)) == (16 + 16 + 16 * 40, 16)
                for fd in fds:
                    os.close(fd)
            for _ in range(100):
                data, fds, flags, _ = socket.recv_fds(greedy.sock, 16 + 16 + 16 * 40, 64)
                assert (len(fds), flags & socket.MSG_CTRUNC) == (16, 0)
                for fd in fds:
                    os.close(fd)


def test_a_large_message_in_many_pieces(tmp_path: Path) -> None:
    message = wire.encode_request(1, wire.REGION_WRITE, wire.RegionAccess(region=0, count=1 << 20).pack() + bytes(1 << 20))
    with serving(tmp_path) as served, served.client() as me:
        for at in range(0, len(message), 99_991):
            me.sock.sendall(message[at : at + 99_991])
        assert me.answer() == (22, b"")
        for byte in wire.encode_request(1, wire.DEVICE_RESET):
            me.sock.sendall(bytes([byte]))
        assert me.answer() == (0, b"")
        me.sock.sendall(struct.pack("<HHIII", 1, 9, (1 << 20) + 100, 0, 0))
        assert me.answer() == (22, b"")
        assert me.ended()


# How it goes.


def _in_the_middle(me: RawClient, memory: SharedMemory) -> None:
    message = wire.encode_request(1, wire.DMA_MAP, wire.DmaMap(flags=3, iova=2 * IOVA, size=PAGE).pack())
    socket.send_fds(me.sock, [message[:20]], [memory.fd] * 5)


def _while_it_is_asked(me: RawClient, memory: SharedMemory) -> None:
    assert me.map(2 * IOVA, PAGE) == 0
    for register, value in ((edu.REG_DMA_SOURCE, 2 * IOVA), (edu.REG_DMA_TARGET, edu.BUFFER_AT), (edu.REG_DMA_COUNT, 8)):
        me.write(0, register, value, 8)
    head = wire.RegionAccess(offset=edu.REG_DMA_COMMAND, count=4).pack()
    me.send(wire.REGION_WRITE, head + bytes([edu.DMA_START, 0, 0, 0]))
    while me.message().header.command != wire.DMA_WRITE:
        pass


def _in_a_flood(me: RawClient, memory: SharedMemory) -> None:
    me.sock.settimeout(0.5)
    with suppress(TimeoutError):
        while True:
            me.sock.send(wire.encode_request(1, wire.REGION_READ, wire.RegionAccess(region=7, count=256).pack()) * 100)


def _with_a_broken_header(me: RawClient, memory: SharedMemory) -> None:
    me.sock.sendall(bytes(16))


def _half_closed(me: RawClient, memory: SharedMemory) -> None:
    me.sock.shutdown(socket.SHUT_WR)


@pytest.mark.parametrize(
    "end", [lambda me, memory: None, _in_the_middle, _while_it_is_asked, _in_a_flood, _with_a_broken_header, _half_closed]
)
def test_whatever_a_client_does_last_nothing_of_it_is_left(
    tmp_path: Path, end: Callable[[RawClient, SharedMemory], None]
) -> None:
    with serving(tmp_path) as served, SharedMemory(4 * PAGE, "gone-with-its-client") as memory:
        before = Stock.take()
        with served.client() as me:
            assert me.map(IOVA, 4 * PAGE, memory.fd) == 0
            me.write(0, edu.REG_FACTORIAL, 5)
            end(me, memory)
        served.wait_for("detached")
        assert beyond(before) == {}
        with served.next_client() as me:
            assert me.read(0, edu.REG_FACTORIAL, 4) == 0


def test_the_end_of_the_server_is_that_of_its_clients(tmp_path: Path) -> None:
    with serving(tmp_path) as served, served.client() as me, SharedMemory(PAGE) as memory:
        assert me.map(IOVA, PAGE, memory.fd) == 0
        served.on_loop(served.server.close)
        served.on_loop(served.server.close)
        assert me.ended()
        assert [event.kind for event in served.events] == ["listening", "attached", "detached"]
        assert served.events[-1].reason == "the server ends"
