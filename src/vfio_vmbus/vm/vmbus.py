"""The carrier between the embedded host and a guest: messages by hypercall and SynIC, doorbells by hypercall or monitor page.

What the guest's processors bring (`deliver`) is taken on their threads and waits for the host's loop; all else is on the loop.
"""

from __future__ import annotations

import asyncio
import os
import threading
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack

from ..errors import IsolationFault, ProtocolError
from ..host.carrier import Carried
from ..iommu.domain import Domain
from ..iommu.translation import READ, WRITE
from ..memory.mapping import PAGE
from ..vfio import eventfd
from ..wire import hyperv
from .kvm import Vm
from .memory import GuestMemory
from .synic import Synic

CHANNELS = 512
"""Channel numbers, 0 among them, which is none's."""
_BUDGET = 64
"""Messages taken before other clients get their turn."""
MAX_INBOX = 256
"""Messages of the guest's that may wait for the loop; then it hears that there is no buffer, and tries again."""
MAX_OUTBOX = 1024
"""Messages to the guest that may wait for its slot; then none of its own are taken."""


class SynicCarrier:
    """Made on the host's loop. synics: of each processor. paused: a context in which no kernel of the data plane runs."""

    channels = CHANNELS

    def __init__(
        self, name: str, vm: Vm, memory: GuestMemory, synics: Sequence[Synic], paused: Callable[[], AbstractContextManager[None]]
    ) -> None:
        self.name = name
        self.targets = len(synics)
        self.failed = False
        self._vm = vm
        self._synics = synics
        self._paused = paused
        self._loop = asyncio.get_running_loop()
        self._carried: Carried | None = None
        self._inbox: deque[bytes] = deque()
        self._called = False
        """Is the loop about to look into the inbox? Both are written by the guest's processors, too; deque is made for that."""
        self._outbox: deque[bytes] = deque()
        self._target = 0
        self._on = [False] * len(synics)
        self._listening: int | None = None
        """The processor whose `taken` the loop looks at, while messages wait for it."""
        self._doorbells: dict[int, int] = {}
        self._lock = threading.Lock()
        """For the doorbells: the guest's processors ring them, too."""
        self.domain = Domain(name)
        with ExitStack() as stack:
            stack.callback(self.domain.close)
            for one in memory.ranges:
                self.domain.map(one.gpa, memory.fd, one.offset, one.size, READ | WRITE)
            stack.pop_all()

    # What the guest's processors bring, on their own threads.

    def deliver(self, message: bytes) -> int:
        """A message of the guest's: a status of the hypervisor's."""
        if len(self._inbox) >= MAX_INBOX:
            return hyperv.STATUS_INSUFFICIENT_BUFFERS
        self._inbox.append(message)
        if not self._called:
            self._called = True
            try:
                self._loop.call_soon_threadsafe(self._take)
            except RuntimeError:  # the loop has ended, and the host with it
                return hyperv.STATUS_INVALID_CONNECTION_ID
        return hyperv.STATUS_SUCCESS

    def signal(self, relid: int) -> int:
        """The guest signals a channel in a way that KVM did not take: a status of the hypervisor's."""
        with self._lock:
            doorbell = self._doorbells.get(relid)
            if doorbell is None:
                return hyperv.STATUS_INVALID_CONNECTION_ID
            eventfd.ring(doorbell)
        return hyperv.STATUS_SUCCESS

    # The loop.

    def synic_changed(self, vp: int, control: int, event_page: int, message_page: int) -> None:
        """A processor's SynIC is like this from now on. What is no memory of the guest's is no page."""
        on = bool(control & hyperv.ENABLED)
        self._on[vp] = on
        messages, events = (self._page(register) if on else 0 for register in (message_page, event_page))
        if self._synics[vp].place(messages, events):
            with self._paused():
                pass  # whoever was about to set a flag in the old page has done so
        self.flush()
        self._call()

    def _page(self, register: int) -> int:
        """The address of a SynIC's page, 0 where it has none."""
        if not register & hyperv.ENABLED:
            return 0
        try:
            return self.domain.translate(register & hyperv.PAGE_MASK, PAGE, READ | WRITE)
        except IsolationFault:  # which the domain keeps
            return 0

    def _take(self) -> None:
        """Take what the guest has sent, a number of messages at a time; none while it takes none of ours."""
        self._called = False
        for _ in range(_BUDGET):
            if not self._inbox or self._carried is None or len(self._outbox) >= MAX_OUTBOX:
                break
            self._carried.receive(self._inbox.popleft())
            self.flush()
        else:
            self._call()

    def _call(self) -> None:
        if self._inbox and not self._called:
            self._called = True
            self._loop.call_soon(self._take)

    def begin(self, carried: Carried) -> None:
        self._carried = carried
        self.domain.revoke = carried.revoke

    def contact(self, target: int) -> None:
        """Messages of a connection before this one are nobody's any more."""
        if target >= self.targets:
            raise ProtocolError(f"messages for processor {target:#x}: there are {self.targets}")
        self._listen(None)
        self._outbox.clear()
        self._target = target
        self.failed = False

    def send(self, message: bytes) -> None:
        self._outbox.append(message)

    def flush(self) -> None:
        """What is for a processor whose SynIC is off is dropped: whoever switches it on again is another kernel."""
        if not self._on[self._target]:
            self._outbox.clear()
        synic = self._synics[self._target]
        while self._outbox and synic.post(self._outbox[0]):
            self._outbox.popleft()
        self._listen(self._target if self._outbox else None)

    def _listen(self, target: int | None) -> None:
        """Look for a processor's having taken a message, or for none's. Each of its interrupts is told there, so only when need be."""
        if target == self._listening:
            return
        if self._listening is not None:
            self._loop.remove_reader(self._synics[self._listening].taken)
        self._listening = target
        if target is not None:
            self._loop.add_reader(self._synics[target].taken, self._taken, self._synics[target].taken)

    def _taken(self, fd: int) -> None:
        eventfd.take(fd)
        self.flush()
        self._call()

    def doorbell(self, relid: int) -> int:
        if relid not in self._doorbells:
            with ExitStack() as stack:
                fd = eventfd.make()
                stack.callback(os.close, fd)
                self._vm.hyperv_eventfd(relid, fd)
                stack.pop_all()
            self._doorbells[relid] = fd
        return self._doorbells[relid]

    def interrupt(self, relid: int, target: int) -> int:
        return self._synics[target].bell(relid)

    def fail(self, error: Exception) -> None:
        """The guest hears nothing of it, as from a host that is gone; its next INITIATE_CONTACT begins anew."""
        self.failed = True
        self._outbox.clear()
        if self._carried is not None:
            self._carried.reset()

    def end(self) -> None:
        if self._carried is None:
            return
        self._listen(None)
        self._carried.reset()
        self._carried = None
        self._inbox.clear()
        self._outbox.clear()

    # Its place at the host.

    def gone(self) -> None:
        """The host ends."""
        self.end()

    def close(self) -> None:
        """No doorbell is rung any more, and none of the guest's memory is in use."""
        with ExitStack() as stack, self._lock:
            stack.callback(self.domain.close)
            while self._doorbells:
                relid, fd = self._doorbells.popitem()
                stack.callback(os.close, fd)
                stack.callback(self._vm.remove_hyperv_eventfd, relid)
