"""The control socket from both sides: who may ask, what is asked, clients and servers without manners, and what processes leave behind."""

from __future__ import annotations

import gc
import json
import os
import socket
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.bus.trees import machine
from vfio_vmbus.bus.machine import Machine
from vfio_vmbus.bus.policy import Isolation
from vfio_vmbus.control import client, server
from vfio_vmbus.control.client import order, process, processes
from vfio_vmbus.control.messages import (
    LONGEST_ANSWER,
    LONGEST_REQUEST,
    Answer,
    Client,
    Command,
    Device,
    Link,
    Mtu,
    Offer,
    Port,
    Report,
    Rescind,
    Status,
    line_of,
    parse_answer,
    parse_request,
)
from vfio_vmbus.control.places import FOLDER, ControlSocket, check_name, places
from vfio_vmbus.control.server import MOST_CLIENTS, ControlServer
from vfio_vmbus.errors import ClosedError, PeerError, ProtocolError, RefusedError, UnavailableError, UsageError
from vfio_vmbus.testing.leaks import nothing_left

REQUESTS = [Status(), Link("nic0", True), Rescind("nic0"), Offer("nic1", "somebody"), Offer("nic0"), Mtu("nic0", 1500)]


class Recorder:
    """Something to be told of; it remembers its orders."""

    def __init__(self) -> None:
        self.orders: list[Command] = []
        self.padding = 0

    def devices(self) -> tuple[Device, ...]:
        return (Device("nic0", "network", Isolation.ISOLATED, "x" * self.padding, counters={"rx_frames": 3}),)

    def clients(self) -> tuple[Client, ...]:
        return ()

    def ports(self) -> tuple[Port, ...]:
        return ()

    def carry_out(self, command: Command) -> str:
        self.orders.append(command)
        match command:
            case Rescind(device="gone"):
                raise ClosedError("the host is closed")
            case Rescind(device="defect"):
                raise ZeroDivisionError
            case Rescind(device="nonsense"):
                raise UsageError("there is no such device")
        return "done"


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Machine:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path / "run"))  # for others than root
    return machine(tmp_path)


@contextmanager
def connected(path: Path) -> Iterator[socket.socket]:
    with socket.socket(socket.AF_UNIX) as sock:
        sock.settimeout(60)
        sock.connect(str(path))
        yield sock


def answered(sock: socket.socket) -> bytes:
    """One line, or what came before the end."""
    taken = b""
    while not taken.endswith(b"\n"):
        part = sock.recv(1 << 16)
        if not part:
            break
        taken += part
    return taken


def folder(here: Machine) -> Path:
    return here.state_folder() / FOLDER


# Messages.


@pytest.mark.parametrize("request_", REQUESTS)
def test_requests_go_over_the_wire(request_: Status | Command) -> None:
    assert parse_request(line_of(request_)) == request_


@pytest.mark.parametrize(
    "line",
    [
        b"",
        b"{}",
        b"null",
        b'{"do":"reboot"}',
        b'{"do":"status","more":1}',
        b'{"do":"link","nic":"a"}',
        b'{"do":"link","nic":"a","up":1}',
        b'{"do":"mtu","nic":"a","size":1e99}',
        b"[" * 5000,
        b'"\xff"',
        b"\xff",
    ],
)
def test_what_is_no_request_is_refused(line: bytes) -> None:
    with pytest.raises(ProtocolError, match="no request"):
        parse_request(line)


@given(st.binary(max_size=200))
def test_no_bytes_are_more_than_a_refusal(line: bytes) -> None:
    for parse in (parse_request, parse_answer):
        with suppress(ProtocolError):
            parse(line)


def test_an_answer_of_a_newer_process_is_understood() -> None:
    report = Report("a", "serve", 1, 2.0, 3, "9.9")
    newer = json.loads(line_of(Answer(report=report)))
    newer["report"]["weather"] = "fair"
    assert parse_answer(json.dumps(newer).encode()).report == report


# A process and who asks it.


def test_a_process_is_found_by_name_and_by_number(here: Machine) -> None:
    with nothing_left(), ControlServer("serve", Recorder(), name="card-1", machine=here):
        (found,) = processes(here)
        assert (found.name, found.pid, found.problem) == ("card-1", os.getpid(), None)
        assert found.report is not None
        assert (found.report.kind, found.report.devices[0].counters) == ("serve", {"rx_frames": 3})
        assert process("card-1", here).pid == process(str(os.getpid()), here).pid == os.getpid()
        for unknown in ("card", "../card-1", "", "1"):
            with pytest.raises(UsageError, match="no process is called"):
                process(unknown, here)
    assert processes(here) == []
    assert list(folder(here).iterdir()) == []


def test_orders_are_carried_out_or_refused_in_the_right_words(here: Machine) -> None:
    subject = Recorder()
    with ControlServer("serve", subject, name="a", machine=here):
        assert order("a", Mtu("nic0", 1500), here) == "done"
        assert subject.orders == [Mtu("nic0", 1500)]
        with pytest.raises(UsageError, match="no such device"):
            order("a", Rescind("nonsense"), here)
        with pytest.raises(RefusedError, match="the host is closed"):
            order("a", Rescind("gone"), here)
        with pytest.raises(RefusedError, match="a defect here: ZeroDivisionError"):
            order("a", Rescind("defect"), here)
        assert order("a", Link("nic0", False), here) == "done"


def test_only_its_user_can_get_at_it(here: Machine) -> None:
    with ControlServer("serve", Recorder(), name="a", machine=here):
        assert folder(here).stat().st_mode & 0o777 == 0o700
        assert (folder(here) / "a").stat().st_mode & 0o777 == 0o600


def test_another_user_is_turned_away(here: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    with ControlServer("serve", Recorder(), name="a", machine=here):
        monkeypatch.setattr(server.Admission, "admits", lambda self, peer: False)
        with connected(folder(here) / "a") as sock:
            assert sock.recv(1) == b""


@pytest.mark.parametrize("said", [b"nonsense\n", b'{"do":"status","more":1}\n', b"\xff\n"])
def test_nonsense_is_answered_and_the_next_request_as_well(here: Machine, said: bytes) -> None:
    with ControlServer("serve", Recorder(), name="a", machine=here), connected(folder(here) / "a") as sock:
        sock.sendall(said)
        answer = parse_answer(answered(sock))
        assert answer.wrong_use
        assert "no request" in str(answer.refused)
        sock.sendall(line_of(Status()))
        assert parse_answer(answered(sock)).report is not None


def test_a_line_without_an_end_ends_the_connection_and_no_other(here: Machine) -> None:
    with ControlServer("serve", Recorder(), name="a", machine=here), connected(folder(here) / "a") as sock:
        with pytest.raises(OSError):  # noqa: PT011  (a broken pipe, or a reset)
            while True:
                sock.sendall(b"x" * LONGEST_REQUEST)
        assert process("a", here).report is not None


def test_who_does_not_read_waits_alone(here: Machine) -> None:
    subject = Recorder()
    subject.padding = 1 << 20
    with ControlServer("serve", subject, name="a", machine=here), connected(folder(here) / "a") as sock:
        sock.sendall(line_of(Status()) * 50)
        found = process("a", here).report
        assert found is not None
        assert len(found.devices[0].why) == 1 << 20


def test_a_client_without_a_word_is_let_go(here: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "PATIENCE", 0.05)
    with ControlServer("serve", Recorder(), name="a", machine=here), connected(folder(here) / "a") as sock:
        assert sock.recv(1) == b""


def test_more_clients_than_there_is_room_for_are_turned_away(here: Machine) -> None:
    with ControlServer("serve", Recorder(), name="a", machine=here):
        path = folder(here) / "a"
        socks = []
        for _ in range(MOST_CLIENTS):
            sock = socket.socket(socket.AF_UNIX)
            sock.settimeout(60)
            sock.connect(str(path))
            sock.sendall(line_of(Status()))
            assert answered(sock)
            socks.append(sock)
        with connected(path) as one_more:
            assert one_more.recv(1) == b""
        for sock in socks:
            sock.close()


def test_closing_leaves_nothing_of_those_that_have_just_come(here: Machine) -> None:
    for _ in range(20):
        with nothing_left(), ExitStack() as clients, ControlServer("serve", Recorder(), name="a", machine=here):
            for _ in range(8):
                clients.enter_context(connected(folder(here) / "a"))
        gc.collect()  # what was not closed says so


def test_closing_ends_those_that_are_connected(here: Machine) -> None:
    with nothing_left():
        control = ControlServer("serve", Recorder(), name="a", machine=here)
        with connected(folder(here) / "a") as sock:
            sock.sendall(line_of(Status()))
            answered(sock)
            control.close()
            assert sock.recv(1) == b""
        control.close()


# Where sockets are.


@pytest.mark.parametrize("name", ["", ".a", "-a", "a/b", "..", "a b", "a\n", "ä", "a" * 33])
def test_names_that_are_none(here: Machine, name: str) -> None:
    with pytest.raises(UsageError, match="no name for a process"):
        check_name(name)
    with pytest.raises(UsageError):
        ControlSocket(name, here)


def test_a_name_is_one_processs(here: Machine) -> None:
    with ControlServer("serve", Recorder(), name="a", machine=here):
        with nothing_left(), pytest.raises(UsageError, match="another process is called a"):
            ControlServer("vm", Recorder(), name="a", machine=here)
        assert process("a", here).report is not None


def test_what_a_dead_process_left_is_recognised_and_replaced(here: Machine) -> None:
    left = ControlSocket("a", here)
    left.socket.close()
    assert [place.name for place in places(here)] == ["a"]
    with ControlServer("serve", Recorder(), name="a", machine=here):
        left.close()  # whose file it is not any more
        assert process("a", here).report is not None
    left = ControlSocket("b", here)
    left.socket.close()
    assert processes(here) == []
    assert list(folder(here).iterdir()) == []


def test_a_file_that_is_no_socket_is_no_process(here: Machine) -> None:
    ControlSocket("a", here).close()
    (folder(here) / "b").write_text("hello")
    (folder(here) / ".hidden").write_text("hello")
    assert [one.name for one in processes(here) if one.problem] in ([], ["b"])
    with ControlServer("serve", Recorder(), name="a", machine=here):
        assert [one.name for one in processes(here) if one.report] == ["a"]


@pytest.mark.parametrize("mode", [0o755, 0o770, 0o777])
def test_a_folder_that_others_may_enter_is_not_used(here: Machine, mode: int) -> None:
    folder(here).mkdir(parents=True)
    folder(here).chmod(mode)
    with nothing_left(), pytest.raises(UnavailableError, match="not a folder that is this user's alone"):
        ControlServer("serve", Recorder(), machine=here)


def test_a_link_instead_of_the_folder_is_not_used(here: Machine, tmp_path: Path) -> None:
    here.state_folder().mkdir(parents=True)
    (tmp_path / "elsewhere").mkdir(mode=0o700)
    folder(here).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UnavailableError):
        ControlServer("serve", Recorder(), machine=here)
    assert list((tmp_path / "elsewhere").iterdir()) == []


def test_where_there_can_be_no_folder_it_is_said(here: Machine) -> None:
    here.state_folder().parent.mkdir(parents=True, exist_ok=True)
    here.state_folder().write_text("a file")
    with nothing_left(), pytest.raises(UnavailableError, match="cannot listen there: "):
        ControlServer("serve", Recorder(), machine=here)


def test_a_path_that_is_too_long_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    deep = tmp_path / ("d" * 80)
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(deep / "run"))
    with pytest.raises(UnavailableError, match="limit 107"):
        ControlServer("serve", Recorder(), machine=machine(deep))


# Processes that are not what they seem.


@contextmanager
def impostor(here: Machine, *answers: bytes, hold: bool = False) -> Iterator[None]:
    """Something that listens as "a", and says this to whoever comes."""
    place = ControlSocket("a", here)
    place.socket.setblocking(True)
    ends = threading.Event()

    def answer() -> None:
        try:
            sock, _ = place.socket.accept()
        except OSError:
            return
        with sock:
            try:
                sock.recv(LONGEST_REQUEST)
                for part in answers:
                    sock.sendall(part)
                if hold:
                    ends.wait(60)
            except OSError:
                pass

    thread = threading.Thread(target=answer)
    thread.start()
    try:
        yield
    finally:
        ends.set()
        place.socket.shutdown(socket.SHUT_RDWR)
        thread.join()
        place.close()


@pytest.mark.parametrize(
    ("answers", "says"),
    [
        ([b"nonsense\n"], "no answer that is understood"),
        ([b"{}\n"], "did not say anything"),
        ([b'{"report":{"name":"a"}}\n'], "no answer that is understood"),
        ([b'{"report":'], "has ended, or turns this user away"),
        ([b"x" * (LONGEST_ANSWER + (1 << 20))], "more than 4194304 bytes"),
        ([], "has ended, or turns this user away"),
    ],
)
def test_whatever_an_impostor_says_is_one_line(here: Machine, answers: list[bytes], says: str) -> None:
    with impostor(here, *answers):
        (found,) = processes(here)
        assert found.report is None
        assert says in str(found.problem)
        assert "\n" not in str(found.problem)


def test_a_process_that_does_not_answer_holds_up_nobody_else(here: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client, "_REPORT_SECONDS", 0.5)
    with impostor(here, b'{"rep', hold=True):
        (found,) = processes(here)
        assert "does not answer within 0.5 s" in str(found.problem)


def test_nobody_is_believed_who_he_is(here: Machine) -> None:
    report = Report("somebody-else", "serve", 1, 2.0, 3, "9.9")
    with impostor(here, line_of(Answer(report=report))):
        (found,) = processes(here)
        assert found.report is not None
        assert (found.report.name, found.report.pid) == ("a", os.getpid())


def test_a_socket_of_another_user_in_a_users_folder_is_not_asked(here: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    with ControlServer("serve", Recorder(), name="a", machine=here):
        monkeypatch.setattr(client.Peer, "of", classmethod(lambda kind, sock: kind(1, 12345)))
        (found,) = processes(here)
        assert "but user 12345's" in str(found.problem)
        with pytest.raises(PeerError, match="12345"):
            order("a", Rescind("a"), here)
