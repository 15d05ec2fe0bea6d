"""`vfio-vmbus net ...`: a network card that this process drives, put to use."""

from __future__ import annotations

import threading
import time
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .card import Card, DeviceOption, JsonOption, MtuOption, PollOption, PortOption, SecondsOption, driven_card, is_embedded
from .device import UnsafeOption
from .faults import FAULT_HEADS, FaultOption, FaultSeedOption, HostileOption, fault_plan, fault_rows
from .output import Progress, count, print_json, print_table, progress
from .stopping import stoppable

if TYPE_CHECKING:
    from ..dataplane.worker import Worker
    from ..drivers.netvsc.driver import Netvsc

app = typer.Typer(help="Drive a VMBus network card from user space.", no_args_is_help=True, rich_markup_mode=None)

_COMPILING = "starting (the first start compiles the data path, some seconds)"


def _wait(
    stop: threading.Event, seconds: float | None, nic: Netvsc, worker: Worker, watch: Any, shown: Progress, verb: str
) -> float:
    """Until stopped, `seconds` are over or the worker has failed, saying how many frames `watch` counts. Returns how long it was.

    Raises what has become of the card.
    """
    start = time.monotonic()
    while not stop.wait(0.5 if seconds is None else max(0.0, min(0.5, start + seconds - time.monotonic()))):
        if not worker.running or (seconds is not None and time.monotonic() - start >= seconds):
            break
        nic.check()
        shown.say(f"{count(watch())} frames {verb}, {time.monotonic() - start:.0f} s; Ctrl-C ends")
    return time.monotonic() - start


def _report(card: Card, result: dict[str, Any], as_json: bool, title: str) -> None:
    ports = {port.name: asdict(port.counters()) for port in card.host.switch.ports} if card.host else {}
    nic = asdict(card.nic.info)
    counters = asdict(card.nic.counters())
    faults = fault_rows(card.host) if card.host else []
    if as_json:
        print_json({**result, "nic": nic, "counters": counters, "ports": ports, **({"faults": faults} if faults else {})})
        return
    print_table(title, ("what", "value"), [(name.replace("_", " "), value) for name, value in result.items()], right=(1,))
    if not ports:
        return
    names = ("rx_frames", "rx_bytes", "tx_frames", "tx_bytes", "no_room", "spoofed", "errors")
    rows = [(name, *(values[key] for key in names)) for name, values in ports.items()]
    heads = ("port", "frames in", "bytes in", "frames out", "bytes out", "no room", "spoofed", "errors")
    print_table("Ports of the switch", heads, rows, right=range(1, 8))
    if faults:
        print_table("Faults", FAULT_HEADS, [list(row.values()) for row in faults], right=(3, 4))


@app.command()
def tap(
    name: Annotated[str, typer.Argument(help="Name of the TAP interface, made if it is not there.")],
    device: DeviceOption = "embedded",
    unsafe: UnsafeOption = False,
    port: PortOption = None,
    mtu: MtuOption = 1500,
    poll: PollOption = "adaptive",
    seconds: SecondsOption = None,
    fault: FaultOption = None,
    fault_seed: FaultSeedOption = 0,
    hostile: HostileOption = False,
    as_json: JsonOption = False,
) -> None:
    """Give the card to the kernel's stack, as a TAP.

    Needs CAP_NET_ADMIN, or a TAP made for you (ip tuntap add NAME mode tap user YOU).

    Example: vfio-vmbus net tap vm0 --port tap:vm1 --port capture:vm.pcap
    """
    faults = fault_plan(fault, hostile, fault_seed)
    from ..apps.lab.tap import open_tap

    embedded = is_embedded(device)
    with progress(_COMPILING) as shown, stoppable() as stop, ExitStack() as stack:
        own = stack.enter_context(open_tap(name, mtu=mtu)) if embedded else None  # an embedded card takes its TAP's address
        card = stack.enter_context(
            driven_card(
                device, port, mtu=mtu, poll=poll, mac=own.mac if own else None, unsafe=unsafe, faults=faults, command="tap"
            )
        )
        interface = own or stack.enter_context(open_tap(name, mac=card.nic.mac, mtu=mtu))
        from ..apps.tap import TapBridge

        with TapBridge(card.nic, interface, poll=poll) as bridge:
            elapsed = _wait(stop, seconds, card.nic, bridge.worker, lambda: sum(_frames(bridge.counters())), shown, "passed")
            bridge.check()
        result = {"tap": name, "mac": interface.mac, "seconds": round(elapsed, 2), **asdict(bridge.counters())}
        _report(card, result, as_json, f"TAP {name}")


def _frames(counters: Any) -> tuple[int, int]:
    return counters.from_tap, counters.to_tap


@app.command()
def fwd(
    device: DeviceOption = "embedded",
    unsafe: UnsafeOption = False,
    port: PortOption = None,
    mtu: MtuOption = 1500,
    poll: PollOption = "adaptive",
    seconds: SecondsOption = None,
    fault: FaultOption = None,
    fault_seed: FaultSeedOption = 0,
    hostile: HostileOption = False,
    as_json: JsonOption = False,
) -> None:
    """Send every frame back to its sender.

    MAC addresses are swapped, in a compiled loop.

    Example: vfio-vmbus net fwd --port generator:64 --seconds 3
    """
    faults = fault_plan(fault, hostile, fault_seed)
    with (
        progress(_COMPILING) as shown,
        stoppable() as stop,
        driven_card(device, port, mtu=mtu, poll=poll, unsafe=unsafe, faults=faults, command="fwd") as card,
    ):
        from ..apps.forward import Forwarder

        with Forwarder(card.nic, poll=poll) as forwarder:
            elapsed = _wait(stop, seconds, card.nic, forwarder.worker, lambda: forwarder.counters().sent, shown, "sent back")
        counters = forwarder.counters()  # of a loop that has ended: read while it runs, they need not agree with each other
        result = {**asdict(counters), "seconds": round(elapsed, 2), "mpps": round(counters.sent / elapsed / 1e6, 3)}
        _report(card, result, as_json, "Forwarded")


@app.command()
def capture(
    file: Annotated[Path, typer.Argument(help="pcap file to write.")],
    device: DeviceOption = "embedded",
    unsafe: UnsafeOption = False,
    port: PortOption = None,
    frames: Annotated[int | None, typer.Option("--count", help="Stop after so many frames.", min=1)] = None,
    snaplen: Annotated[int, typer.Option("--snaplen", help="Bytes kept of a frame.", min=14, max=65535)] = 65535,
    mtu: MtuOption = 1500,
    seconds: SecondsOption = None,
    fault: FaultOption = None,
    fault_seed: FaultSeedOption = 0,
    hostile: HostileOption = False,
    as_json: JsonOption = False,
) -> None:
    """Write what the card receives to a file.

    pcap, with times in nanoseconds; the card listens to everything (promiscuous).

    Example: vfio-vmbus net capture out.pcap --port replay:in.pcap --seconds 1
    """
    faults = fault_plan(fault, hostile, fault_seed)
    from ..apps.capture import capture as run

    with (
        progress(_COMPILING) as shown,
        stoppable() as stop,
        driven_card(device, port, mtu=mtu, promiscuous=True, unsafe=unsafe, faults=faults, command="capture") as card,
    ):
        start = time.monotonic()
        done = run(
            card.nic,
            file,
            frames=frames,
            seconds=seconds,
            snaplen=snaplen,
            stop=stop.is_set,
            progress=lambda number: shown.say(f"{count(number)} frames written; Ctrl-C ends"),
        )
        result = {"file": str(file), **asdict(done), "seconds": round(time.monotonic() - start, 2)}
        _report(card, result, as_json, f"Captured to {file}")


@app.command()
def replay(
    file: Annotated[Path, typer.Argument(help="pcap or pcapng file to send.")],
    device: DeviceOption = "embedded",
    unsafe: UnsafeOption = False,
    port: PortOption = None,
    loops: Annotated[int, typer.Option("--loops", help="Send it so often.", min=1)] = 1,
    recorded_pace: Annotated[bool, typer.Option("--recorded-pace", help="As fast as it was recorded.")] = False,
    mtu: MtuOption = 1500,
    fault: FaultOption = None,
    fault_seed: FaultSeedOption = 0,
    hostile: HostileOption = False,
    as_json: JsonOption = False,
) -> None:
    """Send the frames of a capture.

    As fast as the card takes them, or at the pace at which they were recorded.

    Example: vfio-vmbus net replay in.pcap --port capture:out.pcap
    """
    faults = fault_plan(fault, hostile, fault_seed)
    from ..apps.replay import replay as run

    with (
        progress(_COMPILING) as shown,
        driven_card(device, port, mtu=mtu, allow_spoofing=True, unsafe=unsafe, faults=faults, command="replay") as card,
    ):
        done = run(
            card.nic,
            file,
            loops=loops,
            recorded_pace=recorded_pace,
            progress=lambda number: shown.say(f"{count(number)} frames sent"),
        )
        result = {"file": str(file), "frames": done.frames, "bytes": done.bytes, "seconds": round(done.seconds, 4)}
        _report(card, result, as_json, f"Replayed {file}")


@app.command()
def bench(
    sizes: Annotated[
        list[int] | None, typer.Option("--size", help="Bytes of a frame (repeat for more).", min=60, max=9014)
    ] = None,
    seconds: Annotated[float, typer.Option("--seconds", help="How long to measure each.", min=0.01)] = 1.0,
    poll: PollOption = "adaptive",
    as_json: JsonOption = False,
) -> None:
    """Measure the card: sending, receiving.

    Driver to host to sink, and generator to host to driver, on the embedded host.

    Example: vfio-vmbus net bench --size 64 --size 1500 --seconds 2
    """
    results = []
    with progress(_COMPILING) as shown:
        for size in sizes or [64, 256, 1500]:
            with driven_card("embedded", ["sink"], mtu=max(1500, size - 14), poll=poll, command="bench") as card:
                from ..apps.measure import measure_receiving, measure_sending
                from ..host.embedded import random_mac

                peer = random_mac()
                shown.say(f"sending {size}-byte frames")
                frame = peer + card.nic.mac + b"\x88\xb5" + bytes(size - 14)
                sent = measure_sending(card.nic, frame, seconds)
                shown.say(f"receiving {size}-byte frames")
                assert card.host is not None, "an embedded card has its host here"
                card.host.switch.add_generator(peer, card.nic.mac, size=size)
                received = measure_receiving(card.nic, size, seconds)
                results.append(
                    {
                        "size": size,
                        "tx_mpps": round(sent.mpps, 3),
                        "tx_gbit_per_s": round(sent.gbit_per_s, 3),
                        "rx_mpps": round(received.mpps, 3),
                        "rx_gbit_per_s": round(received.gbit_per_s, 3),
                    }
                )
    if as_json:
        print_json({"results": results})
        return
    heads = ("bytes", "tx Mpps", "tx Gbit/s", "rx Mpps", "rx Gbit/s")
    print_table("netvsc on the embedded host, isolated", heads, [list(row.values()) for row in results], right=range(5))
