"""A guest of the Hyper-V side, without KVM: what its processors would bring is called, what KVM was asked for is noted.

It has memory as a machine has, a SynIC's pages where it likes, and speaks VMBus by hypercall, as hv_vmbus does; then it says what it is
told to. `SynicGuest` has what `RawNic` needs of a client.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import TracebackType
from typing import Any, TypeVar

from tests.host.raw_client import eventually
from vfio_vmbus.host.embedded import EmbeddedHost
from vfio_vmbus.host.vsp import Vsp
from vfio_vmbus.memory.access import and32
from vfio_vmbus.memory.bell import Bell
from vfio_vmbus.memory.kernel import step
from vfio_vmbus.memory.mapping import PAGE, Mapping, Piece
from vfio_vmbus.ring.pair import RingPair
from vfio_vmbus.vfio import eventfd
from vfio_vmbus.vm.hyperv import Hyperv
from vfio_vmbus.vm.memory import MIB, GuestMemory
from vfio_vmbus.vm.paravirt import Hypercall
from vfio_vmbus.vmbus.gpadl import gpadl_messages, whole_pages
from vfio_vmbus.wire import hyperv
from vfio_vmbus.wire import vmbus as wire
from vfio_vmbus.wire.hyperv import PostMessage, SlotHeader
from vfio_vmbus.wire.monitor import number_of, pending_bit
from vfio_vmbus.wire.table import Side

MessageT = TypeVar("MessageT", bound=wire.Message)

INPUT = 0x10000
"""Page of hypercall inputs."""
MONITOR_PAGES = (0x11000, 0x12000)
MESSAGES = 0x20000
EVENTS = 0x30000
"""Pages of processor 0; those of the others follow."""
BUFFERS = 0x100000
SLOT = wire.MESSAGE_SINT * hyperv.MESSAGE_SLOT
FLAGS = wire.MESSAGE_SINT * hyperv.EVENT_FLAGS


@step("i8(i8)")
def _clear(word: int) -> int:
    return and32(word, 0)


class NotedVm:
    """In place of `kvm.Vm`. `lacks`: capabilities that this KVM does not have."""

    def __init__(self, lacks: Sequence[int] = ()) -> None:
        self.lacks = lacks
        self.enabled: list[tuple[int, ...]] = []
        self.filtered: list[tuple[int, int]] = []
        self.routes: list[tuple[int, Any]] = []
        self.irqfds: dict[int, tuple[int, int]] = {}
        self.eventfds: dict[int, int] = {}

    def has(self, capability: int) -> int:
        return int(capability not in self.lacks)

    def enable(self, capability: int, *arguments: int) -> None:
        self.enabled.append((capability, *arguments))

    def filter_msrs(self, ranges: Sequence[tuple[int, int]]) -> None:
        self.filtered += ranges

    def add_route(self, kind: int, where: Any) -> int:
        self.routes.append((kind, where))
        return 23 + len(self.routes)

    def irqfd(self, fd: int, gsi: int, *, resample: int = -1) -> None:
        assert gsi not in self.irqfds
        self.irqfds[gsi] = fd, resample

    def hyperv_eventfd(self, connection_id: int, fd: int) -> None:
        assert connection_id not in self.eventfds
        self.eventfds[connection_id] = fd

    def remove_hyperv_eventfd(self, connection_id: int) -> None:
        del self.eventfds[connection_id]


class NotedVcpu:
    """In place of `kvm.Vcpu`."""

    def __init__(self, index: int) -> None:
        self.index = index
        self.enabled: list[int] = []

    def enable(self, capability: int) -> None:
        self.enabled.append(capability)


class GuestBuffer:
    """Pages of the guest's memory."""

    def __init__(self, memory: GuestMemory, gpa: int, size: int) -> None:
        self.size = size
        self.gpa = gpa
        self.piece = Piece(memory.fd, memory.find(gpa, size).offset + gpa, size)
        self.mapping = Mapping([self.piece])

    @property
    def pfns(self) -> tuple[int, ...]:
        return tuple(range(self.gpa // PAGE, (self.gpa + self.size) // PAGE))

    def close(self) -> None:
        self.mapping.close()

    def __enter__(self) -> GuestBuffer:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


class SynicGuest:
    """`heard`: the host's messages that nobody has asked for yet. options: as of Hyperv."""

    def __init__(self, host: EmbeddedHost, *devices: Vsp, cpus: int = 1, size: int = 64 * MIB, **options: Any) -> None:
        self.vm = NotedVm()
        self.panics: list[str] = []
        self.ram = GuestMemory(size)
        self.hyperv = Hyperv(host, *devices, **options)
        try:
            self.hyperv.prepare(self.vm, self.ram, cpus, self.panics.append)  # type: ignore[arg-type]
        except BaseException:
            self.ram.close()
            raise
        self.vcpus = [NotedVcpu(index) for index in range(cpus)]
        for vcpu in self.vcpus:
            self.hyperv.prepare_vcpu(vcpu)  # type: ignore[arg-type]
        self.heard: list[wire.Message] = []
        self.version: int | None = None
        self.target = 0
        self.eoms = 0
        self._handle = 0
        self._next = BUFFERS
        self._bells: list[Bell] = []

    # The hypervisor's interface.

    def enable(self, vp: int = 0, messages: int | None = None, events: int | None = None) -> None:
        """Switch a SynIC on, as hv_synic_enable_regs: pages first."""
        pages = (MESSAGES + vp * PAGE if messages is None else messages, EVENTS + vp * PAGE if events is None else events)
        for control in (0, hyperv.ENABLED):
            self.hyperv.synic_changed(vp, control, pages[1] | hyperv.ENABLED, pages[0] | hyperv.ENABLED)

    def disable(self, vp: int = 0) -> None:
        self.hyperv.synic_changed(vp, 0, 0, 0)

    def irqfd(self, vp: int = 0) -> tuple[int, int]:
        """The eventfds of a processor's interrupt, and of its acknowledgement."""
        return list(self.vm.irqfds.values())[vp]

    def call(self, code: int, data: bytes = b"", *, gpa: int = INPUT, control: int = 0) -> int:
        """A hypercall with this input in memory: its status."""
        if data:
            self.ram.write(gpa, data)
        return self.hyperv.hypercall(Hypercall(0, code | control, gpa, 0))

    def post(self, payload: bytes, connection_id: int | None = None, **fields: Any) -> int:
        if connection_id is None:
            new = self.version is None or self.version >= wire.VERSION_WIN10_V5
            connection_id = wire.MESSAGE_CONNECTION_ID_4 if new else wire.MESSAGE_CONNECTION_ID
        values = {"message_type": hyperv.MESSAGE_VMBUS, "payload_size": len(payload), "payload": payload[:240].ljust(240, b"\0")}
        return self.call(hyperv.CALL_POST_MESSAGE, PostMessage(connection_id=connection_id, **(values | fields)).pack())

    def signal(self, connection_id: int, flag: int = 0) -> int:
        """HvSignalEvent as a fast hypercall, in the way that KVM does not take."""
        control = hyperv.CALL_SIGNAL_EVENT | hyperv.CALL_FAST
        return self.hyperv.hypercall(Hypercall(0, control, connection_id | flag << 32, 0))

    def slot(self, vp: int | None = None) -> tuple[SlotHeader, bytes]:
        """What is in a message slot."""
        data = self.ram.read(MESSAGES + (self.target if vp is None else vp) * PAGE + SLOT, hyperv.MESSAGE_SLOT)
        return SlotHeader.unpack(data), data[SlotHeader.SIZE :]

    def take(self, vp: int | None = None) -> bytes | None:
        """Take the message out of a slot, as vmbus_on_msg_dpc and vmbus_signal_eom do."""
        vp = self.target if vp is None else vp
        header, payload = self.slot(vp)
        if header.message_type == hyperv.MESSAGE_NONE:
            return None
        assert header.message_type == hyperv.MESSAGE_VMBUS
        slot = self.ram.address(MESSAGES + vp * PAGE + SLOT, hyperv.MESSAGE_SLOT)
        _clear(slot)
        if self.slot(vp)[0].flags & 1:
            self.eoms += 1
            eventfd.ring(self.irqfd(vp)[1])
        return payload[: header.payload_size]

    def event_flags(self, vp: int = 0) -> int:
        """All bits of VMBus' event flags."""
        return int.from_bytes(self.ram.read(EVENTS + vp * PAGE + FLAGS, hyperv.EVENT_FLAGS), "little")

    def clear_flags(self, vp: int = 0) -> None:
        self.ram.write(EVENTS + vp * PAGE + FLAGS, bytes(hyperv.EVENT_FLAGS))

    # VMBus.

    def say(self, *messages: wire.Message | bytes) -> None:
        for message in messages:
            data = message if isinstance(message, bytes) else message.pack()
            eventually(lambda data=data: self.post(data) == hyperv.STATUS_SUCCESS, "a message is taken")

    def listen(self) -> list[wire.Message]:
        while (data := self.take()) is not None:
            self.heard.append(wire.parse_message(data, sender=Side.HOST, version=self.version))
        return self.heard

    def hear(self, kind: type[MessageT]) -> MessageT:
        eventually(lambda: any(isinstance(message, kind) for message in self.listen()), f"a {kind.__name__}")
        found = next(message for message in self.heard if isinstance(message, kind))
        self.heard.remove(found)
        return found

    def contact(self, version: int = wire.SUPPORTED_VERSIONS[0], **fields: Any) -> wire.VersionResponse:
        self.version = None
        new = version >= wire.VERSION_WIN10_V5
        values = {
            "version_requested": version,
            "target_vcpu": self.target,
            "target_info": wire.TargetInfo.of(sint=wire.MESSAGE_SINT) if new else wire.TargetInfo(0),
            "monitor_page1": MONITOR_PAGES[0],
            "monitor_page2": MONITOR_PAGES[1],
        }
        where = wire.MESSAGE_CONNECTION_ID_4 if new else wire.MESSAGE_CONNECTION_ID
        message = wire.InitiateContact(**(values | fields)).pack()
        eventually(lambda: self.post(message, where) == hyperv.STATUS_SUCCESS, "the contact is taken")
        answer = self.hear(wire.VersionResponse)
        if answer.version_supported:
            self.version = version
        return answer

    def connect(self, version: int = wire.SUPPORTED_VERSIONS[0], target: int = 0) -> SynicGuest:
        """SynIC, version, offers."""
        self.target = target
        for vp in range(len(self.vcpus)):
            self.enable(vp)
        assert self.contact(version).version_supported == 1
        self.say(wire.RequestOffers())
        self.hear(wire.AllOffersDelivered)
        return self

    def memory(self, pages: int, *, name: str = "") -> GuestBuffer:
        """Pages of its memory that were not given out before."""
        gpa, self._next = self._next, self._next + pages * PAGE
        return GuestBuffer(self.ram, gpa, pages * PAGE)

    def rings(self, buffer: GuestBuffer, downstream: int, relid: int) -> RingPair:
        """Our end of fresh rings in all of a buffer; the doorbell is the channel's bit in the monitor page."""
        number = number_of(relid)
        assert number is not None
        offset, bits = pending_bit(number)
        self._bells.append(Bell(word=self.ram.address(MONITOR_PAGES[1] + offset, 4), bits=bits))
        for control in (0, downstream):
            buffer.mapping.write(control, bytes(PAGE))
        return RingPair([buffer.piece], downstream, Side.GUEST, self._bells[-1].number, "guest")

    def share(self, pfns: Sequence[int], relid: int = 1, handle: int | None = None) -> wire.GpadlCreated:
        if handle is None:
            self._handle += 1
            handle = self._handle
        self.say(*gpadl_messages(relid, handle, [whole_pages(pfns)]))
        return self.hear(wire.GpadlCreated)

    def unshare(self, handle: int, relid: int = 1) -> None:
        self.say(wire.GpadlTeardown(child_relid=relid, gpadl=handle))
        assert self.hear(wire.GpadlTorndown).gpadl == handle

    def open(self, gpadl: int, downstream: int, relid: int = 1, vp: int = 0) -> int:
        self.say(
            wire.OpenChannel(child_relid=relid, open_id=9, ring_gpadl=gpadl, target_vp=vp, downstream_page_offset=downstream)
        )
        return self.hear(wire.OpenChannelResult).status

    def ping(self) -> None:
        """Have the host map a page and let go of it: it serves us."""
        created = self.share((BUFFERS // PAGE,))
        assert created.status == wire.STATUS_SUCCESS
        self.unshare(created.gpadl)

    def close(self) -> None:
        self.hyperv.close()
        self.ram.close()
        assert self.vm.eventfds == {}

    def __enter__(self) -> SynicGuest:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()
