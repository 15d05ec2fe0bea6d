"""Both ends of a connection with a wire between them that delivers when told to, and a shell that answers when told to.

`World` checks, at every step, what the control plane promises about memory: the host's shell never uses memory that the guest
was told is its own again, and never tears down a GPADL below a channel that runs.
"""

from collections import deque
from uuid import UUID

from vfio_vmbus.vmbus import (
    ChannelClose,
    ChannelModify,
    ChannelOpen,
    Disconnected,
    GpadlCreate,
    GpadlGone,
    GpadlReady,
    GpadlTeardown,
    GuestConnection,
    HostConnection,
    HostLimits,
    Refused,
    RelidReleased,
    Send,
    Unloaded,
    whole_pages,
)
from vfio_vmbus.wire import vmbus as wire
from vfio_vmbus.wire.guids import CLASS_NETWORK

ASKS = (GpadlCreate, GpadlTeardown, ChannelOpen, ChannelClose)


def nic(number=1, sub_channel_index=0):
    """An offer of network device `number`."""
    return wire.ChannelOffer(class_guid=CLASS_NETWORK, instance_guid=UUID(int=number), sub_channel_index=sub_channel_index)


class Shell:
    """What stands around a HostConnection: keeps what is asked of it in `asked` until `answer` or `answer_all`.

    With `at_once` it answers each action before it carries the next one out.
    """

    def __init__(self, host):
        self.host = host
        self.at_once = False
        self.asked = []
        self.sent = deque()
        self.mapped = {}  # GPADL handle -> relid, from GpadlCreate until torn down
        self.running = {}  # relid -> handle of its ring, from ChannelOpen until closed
        self.modified = []
        self.released = []
        self.refused = []
        self.disconnections = 0

    def do(self, actions):
        """Carry actions out; what wants an answer waits in `asked`. Returns the actions."""
        for action in actions:
            if isinstance(action, ASKS):
                self.asked.append(action)
            match action:
                case Send(data):
                    assert len(data) <= wire.MAX_MESSAGE_SIZE
                    if isinstance(wire.parse_message(data), wire.UnloadResponse):
                        assert not self.mapped
                        assert not self.running
                    self.sent.append(data)
                case GpadlCreate(handle, relid):
                    assert handle not in self.mapped
                    self.mapped[handle] = relid
                case GpadlTeardown(handle, relid):
                    assert self.mapped[handle] == relid
                    assert self.running.get(relid) != handle
                case ChannelOpen(relid=relid, ring_gpadl=handle):
                    assert relid not in self.running
                    assert self.mapped[handle] == relid
                    assert GpadlTeardown(handle, relid) not in self.asked
                    self.running[relid] = handle
                case ChannelClose(relid):
                    assert relid in self.running
                case ChannelModify(relid, target_vp):
                    assert relid in self.running
                    self.modified.append((relid, target_vp))
                case RelidReleased(relid):
                    assert relid not in self.running
                    assert relid not in self.mapped.values()
                    self.released.append(relid)
                case Refused(reason):
                    self.refused.append(reason)
                case Disconnected():
                    assert not self.mapped
                    assert not self.running
                    assert not self.asked
                    self.disconnections += 1
            if self.at_once and isinstance(action, ASKS):
                self.answer(self.asked.index(action))
        return actions

    def answer(self, index=0, status=0):
        """Answer what was asked as number `index`; a `status` other than 0 refuses what can be refused."""
        asked = self.asked.pop(index)
        match asked:
            case GpadlCreate(handle):
                if status:
                    del self.mapped[handle]
                return self.do(self.host.gpadl_created(handle, status))
            case GpadlTeardown(handle):
                del self.mapped[handle]
                return self.do(self.host.gpadl_torn_down(handle))
            case ChannelOpen(relid):
                if status:
                    del self.running[relid]
                return self.do(self.host.channel_opened(relid, status))
            case ChannelClose(relid):
                del self.running[relid]
                return self.do(self.host.channel_closed(relid))

    def answer_all(self):
        while self.asked:
            self.answer()

    def end(self):
        """Close, answer everything, and look whether anything is left."""
        before = self.disconnections
        self.do(self.host.close())
        self.answer_all()
        assert self.disconnections == before + 1
        left = (self.mapped, self.running, self.host.relids, self.host.open_relids, self.host.gpadl_handles)
        assert left == ({}, {}, (), (), ())

    def replies(self):
        """The messages sent since the last time, decoded."""
        messages = [wire.parse_message(data, sender=wire.Side.HOST) for data in self.sent]
        self.sent.clear()
        return messages


class World:
    """A host with its shell, a guest, and what is under way between them."""

    def __init__(self, limits=None, **versions):
        self.host = HostConnection(limits or HostLimits(), **versions)
        self.shell = Shell(self.host)
        self.guest = GuestConnection()
        self.to_host = deque()
        self.events = []

    def post(self, sends):
        """Put what a guest's command returned on the wire."""
        self.to_host.extend(send.data for send in sends)

    def deliver_to_host(self):
        self.shell.do(self.host.receive(self.to_host.popleft()))

    def deliver_to_guest(self):
        for event in self.guest.receive(self.shell.sent.popleft()):
            match event:
                case Send(data):
                    self.to_host.append(data)
                case GpadlGone(handle):
                    assert handle not in self.shell.mapped
                case GpadlReady(handle, status=status) if status:
                    assert handle not in self.shell.mapped
                case Unloaded():
                    assert not self.shell.mapped
                    assert not self.shell.running
            self.events.append(event)

    def run(self, sends=()):
        """Send, deliver and answer until nothing moves; the events that came of it."""
        self.post(sends)
        while self.to_host or self.shell.sent or self.shell.asked:
            if self.to_host:
                self.deliver_to_host()
            elif self.shell.sent:
                self.deliver_to_guest()
            else:
                self.shell.answer()
        events, self.events = self.events, []
        return events

    def start(self, *offers, **versions):
        """Connect and take all offers."""
        for offer in offers or (nic(),):
            self.shell.do(self.host.offer(offer)[1])
        self.run(self.guest.connect(**versions))
        self.run(self.guest.request_offers())
        return self

    def gpadl(self, relid=1, pages=8):
        """A ready GPADL over `pages` pages."""
        handle, sends = self.guest.create_gpadl(relid, [whole_pages(range(1000, 1000 + pages))])
        assert self.run(sends) == [GpadlReady(handle, relid, 0)]
        return handle

    def open(self, relid=1, pages=8):
        """An open channel; the handle of its ring."""
        handle = self.gpadl(relid, pages)
        self.run(self.guest.open_channel(relid, handle, pages // 2))
        return handle
