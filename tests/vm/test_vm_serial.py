"""The serial port: what Linux's 8250 driver does with one, and that no order of accesses loses a byte or an interrupt."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from vfio_vmbus.vm.serial import DATA, IER, IIR_FCR, LCR, LSR, MCR, MOST_WAITING, MSR, SCR, Serial

NOTHING, SENT, RECEIVED, FEW_RECEIVED = 0x1, 0x2, 0x4, 0xC


class Line:
    """A port, what came out of it, and its interrupt line with the edges that an interrupt controller sees."""

    def __init__(self) -> None:
        self.out = bytearray()
        self.level = False
        self.edges = 0
        self.port = Serial(self.out.extend, self._set)

    def _set(self, level: bool) -> None:
        assert level != self.level, "told once a change"
        self.level = level
        self.edges += level


def linux_finds(port: Serial) -> str:
    """The steps of autoconfig() in drivers/tty/serial/8250/8250_port.c that tell a 16550A from others."""
    port.write(IER, 0)
    if port.read(IER) & 0x0F:
        return "none"
    port.write(IER, 0x0F)
    if port.read(IER) & 0x0F != 0x0F:
        return "none"
    port.write(IER, 0)
    port.write(MCR, 0x1A)  # loop, OUT2, RTS
    if port.read(MSR) & 0xF0 != 0x90:
        return "no loop"
    port.write(MCR, 0)
    port.write(LCR, 0xBF)
    port.write(IIR_FCR, 0)
    port.write(LCR, 0)
    port.write(IIR_FCR, 1)
    return {0: "8250", 1: "unknown", 2: "16550", 3: "16550A"}[port.read(IIR_FCR) >> 6]


def test_linux_finds_a_16550a() -> None:
    line = Line()
    assert linux_finds(line.port) == "16550A"
    line.port.write(LCR, 0)
    line.port.write(SCR, 0x5A)
    assert line.port.read(SCR) == 0x5A
    assert line.out == b""


def test_the_divisor_is_apart_from_the_data() -> None:
    line = Line()
    line.port.write(LCR, 0x83)
    line.port.write(DATA, 0x01)
    line.port.write(IER, 0x02)
    assert (line.port.read(DATA), line.port.read(IER)) == (0x01, 0x02)
    line.port.write(LCR, 0x03)
    assert (line.port.read(DATA), line.port.read(IER)) == (0, 0)
    assert line.out == b""


@given(st.binary(max_size=100))
def test_a_driver_with_interrupts_sends_all(data: bytes) -> None:
    """As serial8250_tx_chars: 16 bytes an interrupt."""
    line = Line()
    line.port.write(IIR_FCR, 1)
    rest = bytearray(data)
    line.port.write(IER, 2)
    while line.level:
        while line.port.read(IIR_FCR) & 0x0F == SENT:
            assert line.port.read(LSR) & 0x20
            for byte in rest[:16]:
                line.port.write(DATA, byte)
            del rest[:16]
            if not rest:
                line.port.write(IER, 0)
    assert line.out == data


@given(st.lists(st.binary(min_size=1, max_size=40), max_size=5), st.sampled_from([0x01, 0x41, 0x81, 0xC1]))
def test_input_comes_by_interrupts(pieces: list[bytes], fifo: int) -> None:
    line = Line()
    line.port.write(IIR_FCR, fifo)
    line.port.write(IER, 1)
    got = bytearray()
    for piece in pieces:
        line.port.feed(piece)
        assert line.level
        assert line.port.read(IIR_FCR) & 0x0F in (RECEIVED, FEW_RECEIVED)
        while line.port.read(LSR) & 1:
            got.append(line.port.read(DATA))
        assert not line.level
    assert got == b"".join(pieces)
    assert line.edges == len(pieces)


def test_a_driver_that_polls_gets_input_without_interrupts() -> None:
    line = Line()
    line.port.feed(b"ab")
    assert not line.level
    assert line.port.waiting == 2
    assert [line.port.read(DATA), line.port.read(DATA), line.port.read(DATA)] == [*b"ab", 0]


def test_each_transmission_is_an_edge() -> None:
    line = Line()
    line.port.write(IER, 2)
    line.port.read(IIR_FCR)
    before = line.edges
    line.port.write(DATA, 0x41)
    line.port.write(DATA, 0x42)
    assert line.edges == before + 2
    assert line.port.read(IIR_FCR) & 0x0F == SENT
    assert line.port.read(IIR_FCR) & 0x0F == NOTHING


def test_input_that_nobody_reads_is_lost_and_told() -> None:
    line = Line()
    line.port.feed(bytes(MOST_WAITING - 1))
    line.port.feed(b"ab")
    assert line.port.waiting == MOST_WAITING
    assert line.port.read(LSR) & 3 == 3
    assert line.port.read(LSR) & 3 == 1, "told once"


def test_in_a_loop_what_is_sent_comes_back() -> None:
    line = Line()
    line.port.write(MCR, 0x10)
    line.port.write(DATA, 0x55)
    assert line.port.read(DATA) == 0x55
    assert line.out == b""


class Anything(RuleBasedStateMachine):
    """Whatever a guest and a person do, the port answers with bytes, and its line is up while something enabled is pending."""

    def __init__(self) -> None:
        super().__init__()
        self.line = Line()

    @rule(register=st.integers(0, 7), value=st.integers(0, 255))
    def write(self, register: int, value: int) -> None:
        self.line.port.write(register, value)

    @rule(register=st.integers(0, 7))
    def read(self, register: int) -> None:
        assert 0 <= self.line.port.read(register) <= 0xFF

    @rule(data=st.binary(max_size=20))
    def feed(self, data: bytes) -> None:
        self.line.port.feed(data)

    @invariant()
    def the_line_follows_the_reason(self) -> None:
        assert self.line.level == (self.line.port._pending() != NOTHING)


TestAnything = Anything.TestCase
