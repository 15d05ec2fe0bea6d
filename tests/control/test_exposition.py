"""Prometheus' text format, read as its description has it (prometheus.io/docs/instrumenting/exposition_formats)."""

from __future__ import annotations

import re

from hypothesis import given
from hypothesis import strategies as st

from vfio_vmbus.bus.policy import Isolation, UnsafeUse
from vfio_vmbus.control.client import Found
from vfio_vmbus.control.exposition import exposition
from vfio_vmbus.control.messages import Client, Device, Port, Report

NAME = r"[a-zA-Z_:][a-zA-Z0-9_:]*"
LABEL = re.compile(r'([a-zA-Z_][a-zA-Z0-9_]*)="((?:[^"\\\n]|\\\\|\\"|\\n)*)"(,|$)')
SAMPLE = re.compile(rf"({NAME})(?:\{{(.*)\}})? (\S+)")

Sample = tuple[str, tuple[tuple[str, str], ...]]


def read(text: str) -> tuple[dict[str, str], dict[Sample, float]]:
    """Kinds and samples. Fails for what a Prometheus server would not take."""
    kinds: dict[str, str] = {}
    samples: dict[Sample, float] = {}
    current = None
    assert text == "" or text.endswith("\n")
    for line in text.split("\n")[:-1]:
        if line.startswith("# HELP "):
            current = line.split(" ", 3)[2]
            assert current not in kinds, "one group for each metric"
        elif line.startswith("# TYPE "):
            _, _, name, kind = line.split(" ")
            assert name == current
            assert kind in ("counter", "gauge")
            assert (kind == "counter") == name.endswith("_total")
            kinds[name] = kind
        else:
            match = SAMPLE.fullmatch(line)
            assert match, line
            name, labels, value = match.groups()
            assert name == current
            key = (name, tuple(pairs(labels or "")))
            assert key not in samples, "a sample once"
            samples[key] = float(value)
    return kinds, samples


def pairs(labels: str) -> list[tuple[str, str]]:
    found, at = [], 0
    while at < len(labels):
        match = LABEL.match(labels, at)
        assert match, labels
        found.append((match[1], re.sub(r"\\(.)", lambda escape: {"n": "\n"}.get(escape[1], escape[1]), match[2])))
        at = match.end()
    assert len({name for name, _ in found}) == len(found)
    return found


def report(**fields: object) -> Report:
    return Report("s1", "serve", 7, 1000.5, 3, "1.0", **fields)  # type: ignore[arg-type]


def test_a_process_in_numbers() -> None:
    nic = Device("nic0", "network", Isolation.ISOLATED, "why", mtu=9000, link=False, counters={"sent_frames": 2**53 + 1})
    client = Client("c", ("nic0",), "5.3", False, 1, 3, 4096, 5, 8192, faults=6, errors=7)
    port = Port("tap:vm0", "tap", True, {"rx_frames": 8})
    kinds, samples = read(exposition([Found("s1", 7, report(devices=(nic,), clients=(client,), ports=(port,)))], []))
    device = (("process", "s1"), ("device", "nic0"))
    assert samples["vfio_vmbus_isolation", (*device, ("level", "isolated"))] == 1
    assert samples["vfio_vmbus_device_link_up", device] == 0
    assert samples["vfio_vmbus_device_mtu_bytes", device] == 9000
    assert samples["vfio_vmbus_client_faults_total", (("process", "s1"), ("client", "c"))] == 6
    assert samples["vfio_vmbus_port_rx_frames_total", (("process", "s1"), ("port", "tap:vm0"), ("kind", "tap"))] == 8
    assert samples["vfio_vmbus_unsafe_uses", ()] == 0
    assert kinds["vfio_vmbus_device_sent_frames_total"] == "counter"


def test_counters_keep_all_their_digits() -> None:
    nic = Device("nic0", "network", Isolation.ISOLATED, "", counters={"sent_bytes": 2**53 + 1})
    assert f" {2**53 + 1}\n" in exposition([Found("s1", 7, report(devices=(nic,)))], [])


def test_unsafe_processes_are_there_whether_they_answer_or_not() -> None:
    uses = [UnsafeUse(7, "uio_hv_generic of eth1", 5.0, True, True), UnsafeUse(8, "igb_uio", 6.0, True, True)]
    nic = Device("uio0", "network", Isolation.UNSAFE, "nothing keeps it")
    found = [Found("s1", 7, report(devices=(nic,))), Found("s2", 0, problem="does not answer")]
    _, samples = read(exposition(found, uses))
    assert samples["vfio_vmbus_unsafe_uses", ()] == 2
    assert samples["vfio_vmbus_isolation", (("process", "s1"), ("device", "uio0"), ("level", "unsafe"))] == 1
    since = "vfio_vmbus_unsafe_use_start_time_seconds"
    assert samples[since, (("process", "s1"), ("pid", "7"), ("what", "uio_hv_generic of eth1"))] == 5
    assert samples[since, (("process", ""), ("pid", "8"), ("what", "igb_uio"))] == 6
    assert samples["vfio_vmbus_up", (("process", "s2"),)] == 0


def test_two_devices_of_one_name_do_not_spoil_the_rest() -> None:
    nic = Device("nic0", "network", Isolation.ISOLATED, "", counters={"sent_bytes": 1})
    read(exposition([Found("s1", 7, report(devices=(nic, nic)))] * 2, []))


@given(st.text(), st.text(), st.integers(0, 2**64))
def test_no_name_breaks_the_format(name: str, counter: str, value: int) -> None:
    nic = Device(name, name, Isolation.ISOLATED, name, counters={counter: value, "good": value})
    client = Client(name, (name,), None, True, 0, 0, 0, 0, 0, 0, 0, name)
    _, samples = read(exposition([Found(name, 7, report(devices=(nic,), clients=(client,)))], []))
    kept = name.encode(errors="replace").decode()
    assert samples["vfio_vmbus_device_good_total", (("process", "s1"), ("device", kept))] == float(value)
