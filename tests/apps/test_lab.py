"""The kernel's own TCP/IP traffic between two namespaces of a lab, over a plain relay."""

import os
import select
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from types import TracebackType
from typing import Self

import pytest

from vfio_vmbus.apps.lab import Lab, Namespace, NamespaceSpec, Tap, probe
from vfio_vmbus.apps.lab.download import body_file, download
from vfio_vmbus.apps.lab.ping import ECHO_REPLY, HEADER, Exchange, checksum
from vfio_vmbus.apps.lab.tcp import send_tcp
from vfio_vmbus.errors import ClosedError, PeerError, RefusedError, UsageError, WaitTimeout

SIZE = 3_000_001  # bytes, no multiple of anything
ETHERNET_BYTES = 18  # header with a VLAN tag
BURST = 64  # frames between two looks at the poll set


class Relay:
    """The plainest way between two TAPs, for the time of a `with` block: a thread for each direction; counts frames."""

    def __init__(self, left: Tap, right: Tap) -> None:
        self.frames = [0, 0]  # left to right, right to left
        self.dropped = [0, 0]
        self._stop = -1
        self._threads = [
            threading.Thread(target=self._pass, args=(direction, source, sink), name=f"relay-{direction}")
            for direction, (source, sink) in enumerate([(left, right), (right, left)])
        ]

    def _pass(self, direction: int, source: Tap, sink: Tap) -> None:
        poll = select.poll()
        poll.register(self._stop, select.POLLIN)
        poll.register(source.fd, select.POLLIN)
        size = source.mtu + ETHERNET_BYTES
        while all(fd != self._stop for fd, _ in poll.poll()):
            for _ in range(BURST):
                try:
                    frame = os.read(source.fd, size)
                except BlockingIOError:
                    break
                try:
                    os.write(sink.fd, frame)
                    self.frames[direction] += 1
                except OSError:  # the other interface is down, or out of memory
                    self.dropped[direction] += 1

    def __enter__(self) -> Self:
        self._stop = os.eventfd(0, os.EFD_CLOEXEC)
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        os.eventfd_write(self._stop, 1)
        for thread in self._threads:
            thread.join()
        os.close(self._stop)


@pytest.fixture(scope="module")
def reason() -> str | None:
    return probe()


@pytest.fixture(scope="module")
def pair(reason: str | None) -> Iterator[tuple[Namespace, Namespace]]:
    """Two namespaces with a relay between them."""
    if reason is not None:
        pytest.skip(f"no lab on this machine: {reason}")
    with Lab.pair() as lab:
        left, right = lab.namespaces
        with Relay(left.tap, right.tap):
            yield left, right


@pytest.fixture
def cut(reason: str | None) -> Iterator[tuple[Namespace, Namespace]]:
    """Two namespaces with nothing between them."""
    if reason is not None:
        pytest.skip(f"no lab on this machine: {reason}")
    with Lab.pair() as lab:
        left, right = lab.namespaces
        yield left, right


def test_importing_the_lab_is_cheap() -> None:
    code = "import sys, vfio_vmbus.apps.lab; print({'numba', 'numpy', 'pyroute2'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def test_both_ends_ping_each_other(pair: tuple[Namespace, Namespace]) -> None:
    left, right = pair
    for source, dest in ((left, right), (right, left)):
        result = source.ping(dest.address, count=20, interval=0.005, timeout=5)
        assert (result.sent, result.received) == (20, 20)
        assert result.rtt_ms_median is not None
        assert 0 < result.rtt_ms_median < 5000


def test_pings_to_nobody_are_lost_and_have_no_median(pair: tuple[Namespace, Namespace]) -> None:
    result = pair[0].ping("10.77.0.99", count=3, interval=0.01, timeout=0.2)
    assert (result.sent, result.received, result.rtt_ms_median) == (3, 0, None)


def test_more_pings_than_a_stopped_interface_takes_are_lost_not_stuck(
    cut: tuple[Namespace, Namespace],
) -> None:
    result = cut[0].ping(cut[1].address, count=3000, interval=0, timeout=0.1)
    assert (result.sent, result.received) == (3000, 0)


def test_pings_where_half_the_replies_vanish_are_counted(cut: tuple[Namespace, Namespace]) -> None:
    left, right = cut
    stop = threading.Event()

    def relay() -> None:
        replies = 0
        while not stop.is_set():
            for source, sink in ((left.tap, right.tap), (right.tap, left.tap)):
                try:
                    frame = os.read(source.fd, 2000)
                except BlockingIOError:
                    continue
                if frame[12:14] == b"\x08\x00" and frame[34] == ECHO_REPLY:
                    replies += 1
                    if replies % 2 == 0:
                        continue
                    os.write(sink.fd, frame)  # twice: a duplicate counts once
                os.write(sink.fd, frame)

    thread = threading.Thread(target=relay)
    thread.start()
    try:
        result = left.ping(right.address, count=10, interval=0.01, timeout=1.0)
    finally:
        stop.set()
        thread.join()
    assert (result.sent, result.received) == (10, 5)


def test_no_way_to_send_a_ping_is_an_error(pair: tuple[Namespace, Namespace]) -> None:
    with pytest.raises(PeerError, match=r"no way to send a ping to 192\.0\.2\.7: Network is unreachable"):
        pair[0].ping("192.0.2.7", count=1)


def reply_to(run: Exchange, sequence: int, **changed: object) -> bytes:
    """The IPv4 packet that answers a request of the run, or differs from that answer in what is named."""
    body = changed.get("cookie", run.cookie)
    assert isinstance(body, bytes)
    body = body.ljust(56, b"\0")
    head = [changed.get("kind", ECHO_REPLY), changed.get("code", 0), 0]
    tail = [changed.get("identifier", run.identifier), sequence]
    blank = HEADER.pack(*head, *tail)
    head[2] = changed.get("sum", checksum(blank + body))
    source = socket.inet_aton(str(changed.get("source", run.dest)))
    ip = bytes([0x45, 0, 0, 84, 0, 0, 0, 0, 64, 1, 0, 0]) + source + socket.inet_aton("10.77.0.1")
    return ip + HEADER.pack(*head, *tail) + body


def test_only_the_first_reply_to_our_own_request_in_time_counts() -> None:
    run = Exchange("10.77.0.2", timeout=1.0, identifier=7)
    run.sent_at.update({0: 100.0, 1: 100.0})
    for wrong in (
        b"",
        b"\x45" * 10,
        reply_to(run, 0)[:-1],
        reply_to(run, 0, kind=8),
        reply_to(run, 0, code=1),
        reply_to(run, 0, identifier=8),
        reply_to(run, 0, cookie=b"x" * 16),
        reply_to(run, 0, sum=0x1234),
        reply_to(run, 0, source="10.77.0.3"),
        reply_to(run, 2),
    ):
        run.take(wrong, 100.25)
    assert run.rtt_ms == {}
    run.take(reply_to(run, 0), 100.25)
    run.take(reply_to(run, 0), 100.5)
    run.take(reply_to(run, 1), 101.5)
    assert run.rtt_ms == {0: 250.0}


def test_checksum_of_the_example_in_rfc_1071() -> None:
    assert checksum(bytes.fromhex("0001f203f4f5f6f7")) == ~0xDDF2 & 0xFFFF


def test_a_download_brings_the_body_that_is_served(pair: tuple[Namespace, Namespace]) -> None:
    left, right = pair
    body = right.http_serve(SIZE, seed=5)
    assert body.bytes == SIZE
    seen: list[tuple[int, int]] = []
    got = left.http_get(right.http_url(body), progress=lambda done, total: seen.append((done, total)))
    assert (got.bytes, got.sha256) == (SIZE, body.sha256)
    assert got.seconds > 0
    assert seen[-1] == (SIZE, SIZE)


def test_the_body_follows_from_size_and_seed() -> None:
    digests = []
    for size, seed in ((SIZE, 5), (SIZE, 5), (SIZE, 6), (SIZE - 1, 5)):
        file, digest = body_file(size, seed)
        with file:
            assert os.fstat(file.fileno()).st_size == size
        digests.append(digest)
    assert digests[0] == digests[1]
    assert len(set(digests)) == 3


def test_an_empty_body_is_a_body(pair: tuple[Namespace, Namespace]) -> None:
    left, right = pair
    body = right.http_serve(0)
    assert left.http_get(right.http_url(body)).sha256 == body.sha256


def test_downloads_that_cannot_be(pair: tuple[Namespace, Namespace]) -> None:
    left, right = pair
    url = right.http_url(right.http_serve(1000))
    with pytest.raises(RefusedError, match="HTTP status 404"):
        left.http_get(url + "other")
    with pytest.raises(RefusedError, match="Connection refused"):
        left.http_get(f"http://{right.address}:1/")
    for wrong in ("ftp://10.77.0.2/", "http://10.77.0.2:port/", "10.77.0.2", ""):
        with pytest.raises(UsageError, match="http://address:port/ is expected"):
            left.http_get(wrong)


@pytest.mark.parametrize(
    ("answer", "says"),
    [
        (b"nonsense\r\n\r\n", "no HTTP/1.1 answer"),
        (b"", "no HTTP/1.1 answer|closed"),
        (b"HTTP/1.1 200 OK\r\n\r\nbody", "an answer without Content-Length"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nbody", "the body ended after 4 of 9 bytes"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: x\r\n\r\nbody", "an answer without Content-Length"),
    ],
)
def test_answers_that_are_no_download(answer: bytes, says: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve() -> None:
            connection, _ = listener.accept()
            with connection:
                connection.recv(65536)
                connection.sendall(answer)

        thread = threading.Thread(target=serve)
        thread.start()
        port = listener.getsockname()[1]
        with pytest.raises(PeerError, match=says):
            download(f"http://127.0.0.1:{port}/", 60, lambda done, total: None)
        thread.join()


def test_tcp_is_measured_where_it_arrives(pair: tuple[Namespace, Namespace]) -> None:
    left, right = pair
    port = left.tcp_serve()
    for _ in range(2):
        result = right.tcp_send(left.address, port, 0.2)
        assert result.bytes > 0
        assert result.gbit_per_s == pytest.approx(result.bytes * 8 / result.seconds / 1e9, abs=1e-4)


def test_tcp_that_cannot_be(pair: tuple[Namespace, Namespace]) -> None:
    left, right = pair
    with pytest.raises(RefusedError, match="Connection refused"):
        left.tcp_send(right.address, 1, 0.1)
    with pytest.raises(PeerError, match="Network is unreachable"):
        left.tcp_send("192.0.2.7", 9, 0.1)


def test_a_server_that_never_answers() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        with pytest.raises(WaitTimeout, match=f"waited 0.2 s for the download of http://127.0.0.1:{port}/"):
            download(f"http://127.0.0.1:{port}/", 0.2, lambda done, total: None)
        with pytest.raises(WaitTimeout, match=f"waited 0.3 s for TCP to 127.0.0.1:{port} to take 0.1 s of bytes"):
            send_tcp("127.0.0.1", port, 0.1, 0.2)


def test_commands_run_side_by_side_and_end_with_the_lab(reason: str | None) -> None:
    if reason is not None:
        pytest.skip(f"no lab on this machine: {reason}")
    with Lab.pair() as lab, ThreadPoolExecutor() as pool:
        left, right = lab.namespaces
        without_end = pool.submit(left.ping, right.address, count=1, timeout=3600)  # nobody moves the frames
        assert left.ping(left.address, count=3, interval=0).received == 3
        assert not without_end.done()
        lab.close()
        with pytest.raises(ClosedError, match="namespace left: the lab is closed"):
            without_end.result()


def test_frames_are_as_long_as_the_mtu_and_no_longer(reason: str | None) -> None:
    """The relay reads MTU + 18 bytes; a longer frame would be cut, and the checksum of the body wrong."""
    if reason is not None:
        pytest.skip(f"no lab on this machine: {reason}")
    counts = []
    for mtu in (1500, 9000):
        with Lab.pair(mtu) as lab:
            left, right = lab.namespaces
            assert left.tap.mtu == mtu
            with Relay(left.tap, right.tap) as relay:
                body = right.http_serve(SIZE)
                assert left.http_get(right.http_url(body)).sha256 == body.sha256
            counts.append(relay.frames[1])
    assert counts[0] > SIZE // 1460
    assert SIZE // 8960 < counts[1] < counts[0]


def test_frames_carry_the_mac_that_was_asked_for(reason: str | None) -> None:
    if reason is not None:
        pytest.skip(f"no lab on this machine: {reason}")
    mac = bytes.fromhex("00155d010203")
    with Lab(NamespaceSpec("only", "10.1.2.3/8", mac=mac, tap="vmtap")) as lab:
        (only,) = lab.namespaces
        only.ping("10.9.9.9", count=1, interval=0, timeout=0.2)
        frame = os.read(only.tap.fd, 2000)
    assert frame[:6] == b"\xff" * 6  # who has 10.9.9.9?
    assert frame[6:12] == mac
    assert frame[12:14] == b"\x08\x06"


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"address": "10.77.0.1/33"}, "address '10.77.0.1/33'"),
        ({"address": "fe80::1/64"}, "address 'fe80::1/64'"),
        ({"mtu": 67}, "MTU 67: 68 to 65521 bytes"),
        ({"mtu": 65522}, "MTU 65522: 68 to 65521 bytes"),
        ({"mac": b"\x01\0\0\0\0\0"}, "MAC '01:00:00:00:00:00'"),
        ({"mac": b"\x02"}, "MAC '02'"),
        ({"tap": "a-name-too-long-"}, "interface name 'a-name-too-long-'"),
        ({"tap": ""}, "interface name ''"),
        ({"tap": "tap%d"}, "interface name 'tap%d'"),
    ],
)
def test_wrong_namespaces_are_refused_at_once(wrong: dict[str, object], says: str) -> None:
    with pytest.raises(UsageError) as caught:
        NamespaceSpec(**{"name": "wrong", "address": "10.77.0.1/24", **wrong})  # type: ignore[arg-type]
    assert str(caught.value).startswith(says)


def test_wrong_arguments_are_refused_at_once(pair: tuple[Namespace, Namespace]) -> None:
    left, right = pair
    with pytest.raises(UsageError, match=r"address 'right': IPv4"):
        left.ping("right")
    with pytest.raises(UsageError, match="count 0: 1 to 65536"):
        left.ping(right.address, count=0)
    with pytest.raises(UsageError, match="port 65536: 1 to 65535"):
        left.tcp_send(right.address, 65536, 1)
    with pytest.raises(UsageError, match="size -1: 0 to"):
        left.http_serve(-1)
    with pytest.raises(UsageError, match="timeout nan"):
        left.http_get("http://10.77.0.2/", timeout=float("nan"))


def test_the_end_of_a_lab(reason: str | None) -> None:
    if reason is not None:
        pytest.skip(f"no lab on this machine: {reason}")
    lab = Lab(NamespaceSpec("only", "10.77.0.1/24"))
    with lab:
        (only,) = lab.namespaces
        with pytest.raises(UsageError, match="open already"):
            lab.__enter__()
        assert only.ping(only.address, count=1).received == 1
    lab.close()
    with pytest.raises(ClosedError, match="the lab is closed"):
        only.ping(only.address)
    with pytest.raises(ClosedError, match="namespace only has no TAP"):
        assert only.tap
    with lab:  # again
        assert lab.namespaces[0].ping("127.0.0.1", count=1).received == 1
