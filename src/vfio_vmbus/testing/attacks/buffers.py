"""Sections and GPADLs that are not there, not the attacker's, not for this use, or pulled away while in use."""

from __future__ import annotations

from functools import partial

from ...memory.mapping import PAGE
from ...wire import nvsp
from ..attacker import WHOLE, Attack, Attacker, Outcome, marked_message

_WRONG_HANDLES = (0, 1, 0xE1E0F, 0x7FFFFFFF, 0xFFFFFFFF)


def section_indices(attacker: Attacker) -> Outcome:
    """The first one that does not exist, and everything up to the last number but NO_SECTION; as data and as control messages."""
    for index in (attacker.sections, attacker.sections + 1, 1 << 16, 1 << 31, 0xFFFFFFFE):
        attacker.in_section(index, WHOLE)
    return attacker.outcome()


def section_sizes(attacker: Attacker) -> Outcome:
    """More bytes than a section has, in the first and in the last one."""
    for size in (attacker.section + 1, attacker.section + 8, 1 << 20, 1 << 31, 0xFFFFFFFF):
        attacker.in_section(0, size)
        attacker.in_section(attacker.sections - 1, size)
    return attacker.outcome()


def control_sections(attacker: Attacker) -> Outcome:
    """A control message in a section that does not exist."""
    attacker.in_section(attacker.sections, 28, channel=nvsp.CHANNEL_CONTROL)
    return attacker.outcome()


def _send(attacker: Attacker, message: nvsp.NvspMessage) -> Outcome:
    attacker.inband(message)
    return attacker.outcome()


def unknown_receive(attacker: Attacker) -> Outcome:
    _revoke_receive(attacker)
    return _send(attacker, nvsp.SendReceiveBuffer(gpadl=_WRONG_HANDLES[-1], buffer_id=nvsp.RECEIVE_BUFFER_ID))


def unknown_send(attacker: Attacker) -> Outcome:
    attacker.inband(nvsp.RevokeSendBuffer(buffer_id=nvsp.SEND_BUFFER_ID))
    return _send(attacker, nvsp.SendSendBuffer(gpadl=_WRONG_HANDLES[1]))


def foreign_receive(attacker: Attacker) -> Outcome:
    _revoke_receive(attacker)
    for handle in attacker.prey.handles:
        attacker.inband(nvsp.SendReceiveBuffer(gpadl=handle, buffer_id=nvsp.RECEIVE_BUFFER_ID))
    return attacker.outcome()


def foreign_send(attacker: Attacker) -> Outcome:
    attacker.inband(nvsp.RevokeSendBuffer(buffer_id=nvsp.SEND_BUFFER_ID))
    for handle in attacker.prey.handles:
        attacker.inband(nvsp.SendSendBuffer(gpadl=handle))
    return attacker.outcome()


def second_buffers(attacker: Attacker) -> Outcome:
    """Buffers in place of those in use, which are not given back."""
    attacker.inband(nvsp.SendReceiveBuffer(gpadl=attacker.send_buffer.handle, buffer_id=nvsp.RECEIVE_BUFFER_ID))
    attacker.inband(nvsp.SendSendBuffer(gpadl=attacker.receive_buffer.handle))
    return attacker.outcome()


def read_only_receive(attacker: Attacker) -> Outcome:
    """A receive buffer that the host may only read."""
    handle = attacker.connection.create_gpadl(attacker.channel.relid, attacker.mute.pfns)
    _revoke_receive(attacker)
    return _send(attacker, nvsp.SendReceiveBuffer(gpadl=handle, buffer_id=nvsp.RECEIVE_BUFFER_ID))


def write_only_send(attacker: Attacker) -> Outcome:
    """A send buffer that the host may only write."""
    handle = attacker.connection.create_gpadl(attacker.channel.relid, attacker.deaf.pfns)
    attacker.inband(nvsp.RevokeSendBuffer(buffer_id=nvsp.SEND_BUFFER_ID))
    attacker.inband(nvsp.SendSendBuffer(gpadl=handle))
    return attacker.outcome()


def forged_gpadls(attacker: Attacker) -> Outcome:
    """GPADLs over nothing, over others' memory, half over its own, and over page numbers that cannot be."""
    own = attacker.trap.pfns
    lists = [[0], [own[-1] + 1], [own[0], own[-1] + 1], [(1 << 52) - 1], [1 << 51, own[0]]]
    lists += [[iova // PAGE] for iova in attacker.prey.iovas]
    lists += [[address // PAGE] for address in attacker.prey.addresses]
    for pfns in lists:
        attacker.ask(partial(attacker.connection.create_gpadl, attacker.channel.relid, pfns))
    return attacker.outcome()


def torn_down(attacker: Attacker) -> Outcome:
    """Both buffers are torn down under the card, which is then to send out of them."""
    attacker.fill_section(0, marked_message(attacker.mac))
    attacker.connection.teardown_gpadl(attacker.send_buffer.handle)
    attacker.connection.teardown_gpadl(attacker.receive_buffer.handle)
    attacker.in_section(0, len(marked_message(attacker.mac)))
    return attacker.outcome()


def unmapped_buffer(attacker: Attacker) -> Outcome:
    """Memory is unmapped while a send buffer lies in it: all that stands on it must end first."""
    handle = attacker.connection.create_gpadl(attacker.channel.relid, attacker.trap.pfns)
    attacker.inband(nvsp.RevokeSendBuffer(buffer_id=nvsp.SEND_BUFFER_ID))
    attacker.inband(nvsp.SendSendBuffer(gpadl=handle))
    attacker.outcome()
    attacker.trap.close()
    attacker.in_section(0, WHOLE)
    return attacker.outcome()


def _revoke_receive(attacker: Attacker) -> None:
    attacker.inband(nvsp.RevokeReceiveBuffer(buffer_id=nvsp.RECEIVE_BUFFER_ID))


BUFFERS: tuple[Attack, ...] = (
    Attack("section/index", "send sections that do not exist", section_indices),
    Attack("section/size", "more bytes than a send section has", section_sizes),
    Attack("section/control", "a control message in a send section that does not exist", control_sections),
    Attack("gpadl/receive-unknown", "a receive buffer with an unknown handle", unknown_receive),
    Attack("gpadl/send-unknown", "a send buffer with an unknown handle", unknown_send),
    Attack("gpadl/receive-foreign", "a receive buffer with another client's handle", foreign_receive),
    Attack("gpadl/send-foreign", "a send buffer with another client's handle", foreign_send),
    Attack("gpadl/second", "second buffers while the first ones are in use", second_buffers),
    Attack("gpadl/read-only", "a receive buffer that the host may only read", read_only_receive, bus=True),
    Attack("gpadl/write-only", "a send buffer that the host may only write", write_only_send, bus=True),
    Attack("gpadl/forged", "GPADLs over memory of nobody, of others, of the host", forged_gpadls, bus=True),
    Attack("gpadl/torn-down", "buffers torn down while in use", torn_down, bus=True),
    Attack("gpadl/unmapped", "memory unmapped while a buffer lies in it", unmapped_buffer, bus=True),
)
