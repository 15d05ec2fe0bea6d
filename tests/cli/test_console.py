"""`vfio-vmbus console` and `vfio-vmbus balloon` on the embedded host, as a user calls them."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.cli.commands import run, started
from vfio_vmbus.channel.offered import open_offered
from vfio_vmbus.cli.console import Console, parse_line
from vfio_vmbus.errors import UsageError
from vfio_vmbus.host.embedded import EmbeddedHost
from vfio_vmbus.testing.scripted import ScriptedBuffer
from vfio_vmbus.wire import dm, nvsp
from vfio_vmbus.wire.describe import describe, describe_rndis
from vfio_vmbus.wire.gpa import page_range
from vfio_vmbus.wire.guids import CLASS_BALLOON, CLASS_NETWORK, CLASS_SCSI
from vfio_vmbus.wire.ring import PACKET_COMPLETION, PACKET_GPA_DIRECT, PACKET_INBAND, PACKET_XFER_PAGES, Packet, TransferRange
from vfio_vmbus.wire.rndis import IndicateStatus, InitializeRequest, encode_message
from vfio_vmbus.wire.table import Side

VERSION = dm.encode_message(dm.VersionRequest(version=dm.VERSION_2)).hex()
INIT = nvsp.encode_message(nvsp.Init(min_version=nvsp.VERSION_6, max_version=nvsp.VERSION_6)).hex()


def test_a_balloon_answers_what_is_typed() -> None:
    with started("console", "embedded:balloon", "--json") as running:
        assert running.stdin is not None
        assert running.stdout is not None
        running.stdin.write(f"{VERSION}\n")
        sent, answered = json.loads(running.stdout.readline()), json.loads(running.stdout.readline())
        assert (sent["sender"], sent["message"], sent["fields"]["version"]) == ("guest", "VersionRequest", dm.VERSION_2)
        assert (answered["sender"], answered["protocol"], answered["message"]) == ("host", "dynamic memory", "VersionResponse")
        assert answered["fields"]["flags"]["is_accepted"] == 1
        running.send_signal(signal.SIGINT)
        assert running.wait(60) == 0


def test_a_card_completes_and_lines_that_are_none_are_said() -> None:
    with started("console", "embedded:nic") as running:
        assert running.stdin is not None
        assert running.stdout is not None
        assert running.stderr is not None
        running.stdin.write(f"nonsense\n=x 00\n?{INIT}\n")
        lines = [running.stdout.readline()]
        assert "-> in-band #1, wants a completion: NVSP Init" in lines[0]
        while not any("<- completion #1: NVSP InitComplete" in line for line in lines):
            lines.append(running.stdout.readline())
            assert lines[-1], "it ended without an answer"
        running.stdin.close()
        time.sleep(0.01)
        assert running.poll() is None  # the end of the input ends nothing
        running.send_signal(signal.SIGTERM)
        assert running.wait(60) == 0
        said = running.stderr.read()
        assert "not sent: 'nonsense' is no row of hexadecimal digits" in said
        assert "not sent: '=x 00': a completion is =ID HEX" in said


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["console", "embedded:disk"], "embedded:disk: take embedded"),
        (["console", "nonsense"], "nonsense: take embedded"),
        (["console", "unix:"], "unix:: take embedded"),
        (["console", "vmbus:../x"], "is no device"),
        (["balloon", "embedded:nic"], "is no balloon"),
    ],
)
def test_what_makes_no_sense_is_said_in_a_line(words: list[str], says: str) -> None:
    done = run(*words)
    assert done.returncode == 2
    assert says in done.stderr
    assert done.stderr.count("\n") == 1 or "starting" in done.stderr


def test_the_balloon_says_how_it_went() -> None:
    done = run("balloon", "--limit", "8", "--seconds", "0.1", "--json", fresh=True)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert (result["version"], result["limit"], result["pages"]) == ("2.0", 2048, 0)
    assert result["isolation"]


def test_lines_are_packets() -> None:
    assert parse_line("0a ff", 7) == Packet(packet_type=PACKET_INBAND, transaction_id=7, payload=b"\x0a\xff")
    assert parse_line("?00", 7) == Packet(packet_type=PACKET_INBAND, transaction_id=7, completion_requested=True, payload=b"\0")
    assert parse_line("=9 01", 7) == Packet(packet_type=PACKET_COMPLETION, transaction_id=9, payload=b"\1")
    assert parse_line("=9", 7) == Packet(packet_type=PACKET_COMPLETION, transaction_id=9)
    for wrong in ("0", "0x12", "=", "=-1 00", f"={1 << 64}", "=\u0665 00", "??00"):
        with pytest.raises(UsageError):
            parse_line(wrong, 1)


def test_lists_are_described() -> None:
    pages = describe(Packet(packet_type=PACKET_GPA_DIRECT, pages=(page_range(0x5010, 8192),)), CLASS_NETWORK, Side.GUEST)
    assert pages.pages == [{"bytes": 8192, "offset": 16, "pages": [5, 6, 7]}]
    ranges = Packet(packet_type=PACKET_XFER_PAGES, pageset_id=0xCAFE, ranges=(TransferRange(byte_count=60, byte_offset=128),))
    found = describe(ranges, CLASS_NETWORK, Side.HOST)
    assert (found.kind, found.pageset, found.ranges) == ("transfer-pages", 0xCAFE, [{"bytes": 60, "offset": 128}])
    assert describe(Packet(payload=b"\1"), CLASS_SCSI, Side.HOST).message == ""


def test_rndis_is_described_where_it_lies() -> None:
    name, fields = describe_rndis(encode_message(InitializeRequest(request_id=3)), Side.GUEST)
    assert (name, fields["request_id"]) == ("InitializeRequest", 3)
    assert describe_rndis(b"\0" * 20, Side.GUEST) == ("", {})


def test_rndis_messages_in_the_receive_buffer_are_shown(capsys: pytest.CaptureFixture[str]) -> None:
    message = encode_message(IndicateStatus(status=0x4001000B))
    with EmbeddedHost() as host, open_offered(host.attach(host.add_nic())) as device:
        channel = device.open(4)
        buffer = ScriptedBuffer(7, 8192)
        buffer.mapping.write(4096, message)
        ranges = [(len(message), 4096), (64, 0), (64, 8160), (0xFFFFFFFF, 0xFFFFFFFF)]
        packet = Packet(
            packet_type=PACKET_XFER_PAGES,
            pageset_id=0xCAFE,
            ranges=tuple(TransferRange(byte_count=size, byte_offset=offset) for size, offset in ranges),
        )
        for as_json in (True, False):
            Console(device, channel, as_json, buffer)._show(packet, Side.HOST)
        buffer.close()
    first, *lines = capsys.readouterr().out.splitlines()
    found = json.loads(first)["transfers"]
    assert (found[0]["protocol"], found[0]["message"], found[0]["fields"]["status"]) == ("RNDIS", "IndicateStatus", 0x4001000B)
    assert found[1:] == [{}, {}, {}]
    assert sum("RNDIS IndicateStatus" in line for line in lines) == 1


@given(
    payload=st.binary(max_size=64),
    kind=st.sampled_from([PACKET_INBAND, PACKET_COMPLETION, PACKET_XFER_PAGES, 0x55]),
    class_guid=st.sampled_from([CLASS_BALLOON, CLASS_NETWORK, CLASS_SCSI]),
    sender=st.sampled_from([Side.HOST, Side.GUEST]),
)
def test_whatever_comes_can_be_described(payload, kind, class_guid, sender) -> None:
    found = describe(Packet(packet_type=kind, payload=payload), class_guid, sender)
    assert bool(found.message) == bool(found.protocol) == bool(found.fields)
    json.dumps(found.fields)


def test_nobody_needs_a_terminal() -> None:
    """Input from nowhere, output to nobody."""
    reading, writing = os.pipe()
    os.close(reading)
    command = [sys.executable, "-m", "vfio_vmbus", "console", "embedded:balloon", "--seconds", "0.2"]
    with open(os.devnull, "rb") as nothing:
        done = subprocess.run(command, stdin=nothing, stdout=writing, stderr=subprocess.PIPE, timeout=120, check=False)
    os.close(writing)
    assert done.returncode == 0, done.stderr
