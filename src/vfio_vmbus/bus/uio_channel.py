"""A channel of a VMBus device that uio_hv_generic has, open as long as its node is.

The kernel opens the primary channel, with empty rings, when the first process opens the node, and closes it when the last one is gone,
however it ended. Each channel here has an opening of its own: each has its own count of interrupts. Facts by kernel: docs/hyper-v.md.
"""

from __future__ import annotations

import errno
import fcntl
import os
import select
from contextlib import ExitStack
from typing import Final

from ..channel.device import Channel
from ..errors import ProtocolError, RefusedError, RescindedError, UnavailableError
from ..memory.bell import Bell
from ..memory.mapping import PAGE, Mapping, Piece
from ..ring.pair import RingPair
from ..wire.monitor import pending_bit
from ..wire.table import Side
from .uio import MONITOR_PAGE, RINGS, UioNode

MAX_RING_BYTES: Final = 128 << 20
_GONE: Final = select.POLLERR | select.POLLHUP | select.POLLNVAL


class UioChannel(Channel):
    """Channel `relid` of `node`; the primary one is the device's while this is open: a second process is refused.

    monitor: the channel's number in the monitor page, None if it is signalled by hypercall, which is the kernel's to do.
    interrupt: the node, which is readable when the host has signalled since it was read; with subchannels, on any of them.
    Raises RefusedError when the host does not open the channel, RescindedError when it takes it away, UnavailableError when another
    process has it, or this one may not.
    """

    def __init__(self, node: UioNode, relid: int, monitor: int | None, *, primary: bool) -> None:
        self.relid = relid
        self._node = node
        with ExitStack() as stack:
            self.interrupt = open_node(node, alone=primary)
            stack.callback(os.close, self.interrupt)
            halves = [stack.enter_context(mapping) for mapping in self._map_rings(primary)]
            self._bell = self._make_bell(monitor, stack)
            self.doorbell = self._bell.number
            pair = RingPair.over(halves[0], halves[1], Side.GUEST, self.doorbell, f"{node.name}, channel {relid}")
            self.outgoing = pair.outgoing
            self.incoming = pair.incoming
            self._resources = stack.pop_all()
        self.closed = False

    @property
    def gone(self) -> bool:
        """Has the device been taken away, from the guest or from this driver?"""
        poller = select.poll()
        poller.register(self.interrupt, select.POLLIN)
        return any(events & _GONE for _, events in poller.poll(0)) or not self._node.present

    def wait(self, seconds: float) -> bool:
        """As of Channel. Raises RescindedError when the device is gone."""
        poller = select.poll()
        poller.register(self.interrupt, select.POLLIN)
        events = poller.poll(max(0, int(seconds * 1000 + 0.999)))
        if not events:
            return False
        try:
            return len(os.read(self.interrupt, 4)) == 4
        except BlockingIOError:
            return False
        except OSError as error:
            raise RescindedError(
                f"{self._node.name} is gone ({error.strerror}): the host took it, or another driver has it"
            ) from error

    def close(self) -> None:
        self.closed = True
        self._resources.close()

    def _map_rings(self, primary: bool) -> list[Mapping]:
        """Both rings, the one to the host first: out of the channel's own file, or of the node's first map where there is none."""
        whole = self._node.maps.get(RINGS)
        with ExitStack() as stack:
            try:
                file = os.open(self._node.ring_file(self.relid), os.O_RDWR | os.O_CLOEXEC)
            except FileNotFoundError:
                if not primary or whole is None:
                    raise UnavailableError(f"{self._node.name} has no rings to map for channel {self.relid}") from None
                rings = whole.part(self.interrupt)
            except OSError as error:
                raise UnavailableError(f"{self._node.ring_file(self.relid)}: {error.strerror}: run as root") from error
            else:
                stack.callback(os.close, file)
                # 6.12 gives every ring file one size, whatever the rings have; the node's map knows the primary channel's
                rings = Piece(file, 0, whole.size if primary and whole else os.fstat(file).st_size)
            if rings.size % (2 * PAGE) or not 4 * PAGE <= rings.size <= MAX_RING_BYTES:
                raise ProtocolError(
                    f"{self._node.name}: rings of {rings.size} bytes together: need pages, and two for each at least"
                )
            return self._halves(rings)

    def _halves(self, rings: Piece) -> list[Mapping]:
        half = rings.size // 2
        try:
            with ExitStack() as made:
                parts = [Piece(rings.fd, at, half, whole=rings.whole) for at in (0, half)]
                mappings = [made.enter_context(Mapping([part], wrap_from=PAGE, vanishes=True)) for part in parts]
                made.pop_all()
                return mappings
        except OSError as error:
            if error.errno == errno.ENODEV:
                raise RescindedError(f"{self._node.name}: channel {self.relid} is not open any more") from error
            raise UnavailableError(f"{self._node.name}: the rings of channel {self.relid} cannot be mapped: {error}") from error

    def _make_bell(self, monitor: int | None, stack: ExitStack) -> Bell:
        if monitor is None:
            return Bell(file=self.interrupt)
        page = self._node.maps.get(MONITOR_PAGE)
        if page is None:
            raise UnavailableError(f"{self._node.name} has no monitor page to signal channel {self.relid} by")
        mapping = stack.enter_context(Mapping([Piece(self.interrupt, page.start, page.size)]))
        offset, bits = pending_bit(monitor)
        return Bell(word=mapping.address + offset, bits=bits)


def open_node(node: UioNode, *, alone: bool) -> int:
    """The node, open for waiting without blocking. alone: nobody else has it this way. Raises as UioChannel."""
    try:
        handle = os.open(node.path, os.O_RDWR | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as error:
        raise _refusal(node, error) from error
    if alone:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(handle)
            raise UnavailableError(f"{node.path} is in use by another process (vfio-vmbus audit says by which)") from error
    return handle


def _refusal(node: UioNode, error: OSError) -> Exception:
    if error.errno in (errno.EACCES, errno.EPERM):
        return UnavailableError(f"{node.path}: {error.strerror} for uid {os.geteuid()}: run as root")
    if error.errno in (errno.ENODEV, errno.ENXIO, errno.ENOENT):
        return RescindedError(f"{node.path} is gone ({error.strerror}): the host took it, or another driver has it")
    return RefusedError(f"{node.path} does not open ({error.strerror}): the host refused the channel, or memory is short")
