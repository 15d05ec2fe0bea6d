"""The serial port: a 16550A whose line is infinitely fast, sans-IO.

It has FIFOs, because Linux sends 16 bytes for each look at the line's state then, and every access to a port ends the guest's run.
Source: National Semiconductor PC16550D; what Linux tries while it looks for one: drivers/tty/serial/8250/8250_port.c.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from typing import Final

PORT: Final = 0x3F8
PORTS: Final = 8
IRQ: Final = 4
MOST_WAITING: Final = 1 << 16
"""Bytes of input that wait for the guest at most; what comes then is lost, and the guest is told (overrun)."""

# Registers. With LCR's DLAB, 0 and 1 are the divisor.
DATA, IER, IIR_FCR, LCR, MCR, LSR, MSR, SCR = range(8)

IER_RX: Final = 0x01
IER_TX: Final = 0x02
IIR_NONE: Final = 0x01
IIR_TX: Final = 0x02
IIR_RX: Final = 0x04
IIR_RX_TIMEOUT: Final = 0x0C
IIR_FIFOS: Final = 0xC0
FCR_ENABLE: Final = 0x01
FCR_CLEAR_RX: Final = 0x02
LCR_DLAB: Final = 0x80
MCR_LOOP: Final = 0x10
LSR_READY: Final = 0x01
LSR_OVERRUN: Final = 0x02
LSR_EMPTY: Final = 0x60
"""The transmitter is always done."""
MSR_CONNECTED: Final = 0xB0
"""Carrier, data set ready, clear to send."""
_TRIGGERS: Final = (1, 4, 8, 14)


class Serial:
    """output: gets each byte that the guest sends, on its vCPU's thread; it ought not to wait. interrupt: gets the line's level whenever
    that changes.

    Any thread may call any method.
    """

    def __init__(self, output: Callable[[bytes], object], interrupt: Callable[[bool], None]) -> None:
        self._output = output
        self._interrupt = interrupt
        self._lock = threading.Lock()
        self._input = deque[int]()
        self._level = False
        self._sent = False  # THR has become empty, and the guest was not told yet
        self._overrun = 0
        self._ier = self._fcr = self._lcr = self._mcr = self._scr = 0
        self._divisor = 12  # 9600 baud, which means nothing here

    def feed(self, data: bytes) -> None:
        """Input for the guest."""
        with self._lock:
            self._take(data)

    @property
    def waiting(self) -> int:
        """Bytes of input that the guest has not read."""
        return len(self._input)

    def read(self, register: int) -> int:
        """A byte of a register (0 to 7)."""
        with self._lock:
            return self._read(register)

    def write(self, register: int, value: int) -> None:
        """Store a byte into a register (0 to 7)."""
        if register == DATA and not (self._lcr & LCR_DLAB or self._mcr & MCR_LOOP):
            self._output(bytes((value,)))  # without the lock: it is somebody else's code
        with self._lock:
            self._write(register, value)

    def _read(self, register: int) -> int:
        if self._lcr & LCR_DLAB and register in (DATA, IER):
            return self._divisor >> 8 * register & 0xFF
        if register == DATA:
            value = self._input.popleft() if self._input else 0
            self._update()
            return value
        if register == IIR_FCR:
            return self._identify()
        if register == LSR:
            value = LSR_EMPTY | self._overrun | (LSR_READY if self._input else 0)
            self._overrun = 0
            return value
        if register == MSR:
            return self._looped() if self._mcr & MCR_LOOP else MSR_CONNECTED
        return {IER: self._ier, LCR: self._lcr, MCR: self._mcr, SCR: self._scr}[register]

    def _write(self, register: int, value: int) -> None:
        if self._lcr & LCR_DLAB and register in (DATA, IER):
            shift = 8 * register
            self._divisor = self._divisor & ~(0xFF << shift) | value << shift
        elif register == DATA:
            if self._mcr & MCR_LOOP:
                self._take(bytes((value,)))
            self._sent = False
            self._update()  # the line goes down and up again: the interrupt is an edge
            self._sent = True
        elif register == IER:
            if value & ~self._ier & IER_TX:
                self._sent = True
            self._ier = value & 0x0F
        elif register == IIR_FCR:
            if value & FCR_CLEAR_RX or (value ^ self._fcr) & FCR_ENABLE:
                self._input.clear()
            self._fcr = value & 0xC9
        elif register == LCR:
            self._lcr = value
        elif register == MCR:
            self._mcr = value & 0x1F
        elif register == SCR:
            self._scr = value
        self._update()

    def _pending(self) -> int:
        """The most urgent reason for an interrupt."""
        if self._ier & IER_RX and self._input:
            trigger = _TRIGGERS[self._fcr >> 6] if self._fcr & FCR_ENABLE else 1
            return IIR_RX if len(self._input) >= trigger else IIR_RX_TIMEOUT
        if self._ier & IER_TX and self._sent:
            return IIR_TX
        return IIR_NONE

    def _identify(self) -> int:
        reason = self._pending()
        if reason == IIR_TX:
            self._sent = False
            self._update()
        return reason | (IIR_FIFOS if self._fcr & FCR_ENABLE else 0)

    def _looped(self) -> int:
        """The modem's lines when ours are led back: DTR to DSR, RTS to CTS, OUT1 to RI, OUT2 to DCD."""
        mcr = self._mcr
        return (mcr & 0x01) << 5 | (mcr & 0x02) << 3 | (mcr & 0x04) << 4 | (mcr & 0x08) << 4

    def _take(self, data: bytes) -> None:
        room = MOST_WAITING - len(self._input)
        self._input.extend(data[:room])
        if len(data) > room:
            self._overrun = LSR_OVERRUN
        self._update()

    def _update(self) -> None:
        level = self._pending() != IIR_NONE
        if level != self._level:
            self._level = level
            self._interrupt(level)
