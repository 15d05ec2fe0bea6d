"""`vfio-vmbus console`: the packets of a channel, seen and sent by hand."""

from __future__ import annotations

import ctypes
import os
import select
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import UsageError
from .card import SecondsOption
from .device import AnyDeviceArgument, UnsafeOption, opened_device
from .stopping import on_stop

if TYPE_CHECKING:
    from ..channel.device import Channel, SharedBuffer, VmbusDevice
    from ..wire.ring import Packet
    from ..wire.table import Side

_DUMP = 16
_LONGEST_LINE = 1 << 20


def console(
    device: AnyDeviceArgument,
    unsafe: UnsafeOption = False,
    ring_pages: Annotated[int, typer.Option("--ring-pages", help="Of each ring, where we make them.", min=2, max=4095)] = 16,
    receive_buffer: Annotated[
        int,
        typer.Option("--receive-buffer", help="Share so many KiB first, and decode the RNDIS messages that come there.", min=0),
    ] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object a packet.")] = False,
    seconds: SecondsOption = None,
) -> None:
    """Watch the packets of any VMBus device, and send your own.

    For people who write drivers. Opens the device's channel and prints what the host sends, decoded where
    the protocol is known (NVSP of network cards, dynamic memory of balloons). Each line typed is a packet:

    HEX is an in-band one with this payload, ?HEX one that asks for a completion, =ID HEX completes transaction ID.

    Ends with Ctrl-C or after --seconds; the end of the input ends nothing.

    Example: echo 01001000010000000000020000000000 | vfio-vmbus console embedded:balloon --seconds 1
    """
    from ..channel.device import WRITE

    with opened_device(device, unsafe=unsafe, command="console") as opened, _stoppable() as stop:
        channel = opened.open(ring_pages)
        buffer = opened.share(receive_buffer << 10, WRITE, "receive") if receive_buffer else None
        if buffer is not None:
            print(f"receive buffer: GPADL {buffer.handle:#x}, {buffer.size} bytes", file=sys.stderr, flush=True)
        Console(opened, channel, as_json, buffer).run(seconds, stop)


@contextmanager
def _stoppable() -> Iterator[int]:
    """A descriptor that becomes readable on Ctrl-C and SIGTERM, so that the channel is closed on the way out."""
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    try:
        with on_stop(lambda: os.write(writing, b"!")):
            yield reading
    finally:
        os.close(reading)
        os.close(writing)


class Console:
    """A channel, a keyboard and a screen."""

    def __init__(self, device: VmbusDevice, channel: Channel, as_json: bool, buffer: SharedBuffer | None = None) -> None:
        self._device = device
        self._buffer = buffer
        self._channel = channel
        self._json = as_json
        self._started = time.monotonic()
        self._unfinished = b""
        self._transaction = 0

    def run(self, seconds: float | None, stop: int) -> None:
        """Until `stop` is readable, or `seconds` are over. Raises PeerError as rings and channels do."""
        end = None if seconds is None else self._started + seconds
        keyboard = sys.stdin.fileno()
        inputs = [stop, keyboard, self._channel.interrupt]
        if not self._json:
            print(f"{self._device.name}: lines of hexadecimal digits are sent; Ctrl-C ends", file=sys.stderr)
        while end is None or time.monotonic() < end:
            self._take_packets()
            if self._channel.incoming.unmask():
                continue
            left = 1.0 if end is None else min(1.0, max(0.0, end - time.monotonic()))
            ready, _, _ = select.select(inputs, [], [], left)
            if stop in ready:
                return
            if self._channel.interrupt in ready:
                self._channel.wait(0)
            if keyboard in ready and not self._take_input():
                inputs.remove(keyboard)
        self._take_packets()

    def _take_packets(self) -> None:
        from ..wire.table import Side

        while (packet := self._channel.incoming.receive()) is not None:
            self._show(packet, Side.HOST)

    def _take_input(self) -> bool:
        """Send whole lines. False at the end of the input."""
        data = os.read(sys.stdin.fileno(), 65536)
        *lines, self._unfinished = (self._unfinished + data).split(b"\n")
        if not data and self._unfinished:
            lines, self._unfinished = [self._unfinished], b""
        for line in lines:
            self._send(line.decode(errors="replace").strip())
        if len(self._unfinished) > _LONGEST_LINE:
            raise UsageError(f"a line of more than {_LONGEST_LINE} bytes")
        return bool(data)

    def _send(self, line: str) -> None:
        """What cannot be sent is said, and the console goes on."""
        from ..wire.table import Side

        if not line:
            return
        try:
            packet = parse_line(line, self._transaction + 1)
            sent = self._channel.outgoing.send_packet(packet)
        except UsageError as error:
            print(f"not sent: {error}", file=sys.stderr, flush=True)
            return
        if not sent:
            print("not sent: the ring is full", file=sys.stderr, flush=True)
            return
        self._transaction = max(self._transaction, packet.transaction_id)
        self._show(packet, Side.GUEST)

    def _transfer(self, place: dict[str, int]) -> dict[str, Any]:
        """The RNDIS message in a part of the receive buffer, as far as there is one."""
        from ..wire.describe import describe_rndis
        from ..wire.table import Side

        offset, size = place["offset"], place["bytes"]
        if self._buffer is None or offset + size > self._buffer.size:
            return {}
        name, fields = describe_rndis(ctypes.string_at(self._buffer.address + offset, size), Side.HOST)
        return {"protocol": "RNDIS", "message": name, "fields": fields} if name else {}

    def _show(self, packet: Packet, sender: Side) -> None:
        from ..wire.describe import describe
        from ..wire.table import Side

        found = asdict(describe(packet, self._device.class_guid, sender))
        found["transfers"] = [self._transfer(each) for each in found["ranges"]] if sender is Side.HOST else []
        seconds = round(time.monotonic() - self._started, 6)
        if self._json:
            import msgspec

            found["payload"] = packet.payload.hex()
            print(msgspec.json.encode({"seconds": seconds, **found}).decode(), flush=True)
            return
        print("\n".join(_lines(seconds, found)), flush=True)


def _lines(seconds: float, found: dict[str, Any]) -> Iterator[str]:
    arrow = "->" if found["sender"] == "guest" else "<-"
    asks = ", wants a completion" if found["completion_requested"] else ""
    said = f"{found['protocol']} {found['message']}" if found["message"] else f"{len(found['payload'])} bytes"
    yield f"{seconds:10.6f} {arrow} {found['kind']} #{found['transaction']}{asks}: {said}"
    if found["message"]:
        yield "             " + ", ".join(f"{name}={value}" for name, value in found["fields"].items())
    for each in found["pages"]:
        yield f"             {each['bytes']} bytes at {each['offset']} of pages {', '.join(map(hex, each['pages'][:8]))}"
    for number, each in enumerate(found["ranges"]):
        yield f"             {each['bytes']} bytes at {each['offset']} of page set {found['pageset']:#x}"
        if number < len(found["transfers"]) and found["transfers"][number]:
            rndis = found["transfers"][number]
            yield f"             RNDIS {rndis['message']} " + ", ".join(
                f"{name}={value}" for name, value in rndis["fields"].items()
            )
    if not found["message"]:
        for at in range(0, len(found["payload"]), _DUMP):
            part = found["payload"][at : at + _DUMP]
            text = "".join(chr(byte) if 32 <= byte < 127 else "." for byte in part)
            yield f"             {at:04x}  {part.hex(' '):<{3 * _DUMP}} {text}"


def parse_line(line: str, transaction: int) -> Packet:
    """The packet that a line stands for. Raises UsageError for what is none."""
    from ..wire.ring import PACKET_COMPLETION, PACKET_INBAND, Packet

    asks = line.startswith("?")
    kind = PACKET_COMPLETION if line.startswith("=") else PACKET_INBAND
    text = line[1:] if line[0] in "?=" else line
    if kind == PACKET_COMPLETION:
        number, _, text = text.strip().partition(" ")
        if not number.isascii() or not number.isdecimal() or int(number) >> 64:
            raise UsageError(f"{line[:40]!r}: a completion is =ID HEX, with the number of a transaction")
        transaction = int(number)
    try:
        payload = bytes.fromhex(text)
    except ValueError:
        raise UsageError(f"{line[:40]!r} is no row of hexadecimal digits: HEX, ?HEX or =ID HEX") from None
    return Packet(packet_type=kind, transaction_id=transaction, completion_requested=asks, payload=payload)
