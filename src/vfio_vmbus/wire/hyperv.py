"""The hypervisor's own interface, as far as VMBus needs it: CPUID leaves, MSRs, hypercalls, the pages of a SynIC. x86-64.

Sources: Hypervisor Top Level Functional Specification (TLFS) 6.0b; include/asm-generic/hyperv-tlfs.h and
arch/x86/include/asm/hyperv-tlfs.h of Linux 6.12.
"""

from typing import Annotated, Final

from vfio_vmbus.wire.layout import U8, U16, U32, U64, Raw, Struct, struct

# ---- CPUID. The vendor leaf says how many there are; "Hv#1" says that the others have these meanings.
LEAF_VENDOR: Final = 0x40000000
LEAF_INTERFACE: Final = 0x40000001
LEAF_VERSION: Final = 0x40000002
LEAF_FEATURES: Final = 0x40000003
LEAF_RECOMMENDATIONS: Final = 0x40000004
LEAF_LIMITS: Final = 0x40000005

VENDOR: Final = b"Microsoft Hv"  # EBX, ECX, EDX
INTERFACE: Final = b"Hv#1"  # EAX

# EAX of LEAF_FEATURES: MSRs that the guest may use.
REFERENCE_COUNTER: Final = 1 << 1
SYNIC: Final = 1 << 2
HYPERCALL_MSRS: Final = 1 << 5
VP_INDEX: Final = 1 << 6
REFERENCE_TSC: Final = 1 << 9
FREQUENCY_MSRS: Final = 1 << 11
# EBX: hypercalls that the guest may make.
POST_MESSAGES: Final = 1 << 4
SIGNAL_EVENTS: Final = 1 << 5
# EDX: what there is besides.
FREQUENCIES_AVAILABLE: Final = 1 << 8
CRASH_MSRS: Final = 1 << 10

NO_AUTO_EOI: Final = 1 << 9  # EAX of LEAF_RECOMMENDATIONS: do not ask for interrupts that end themselves
NEVER_NOTIFY_SPINNING: Final = 0xFFFFFFFF  # EBX: how often to try a lock before telling the hypervisor

# ---- MSRs
MSR_GUEST_OS_ID: Final = 0x40000000  # what a guest that knows the hypervisor says of itself, before it asks for anything
MSR_CRASH_P0: Final = 0x40000100  # and four more behind it; the last two are address and length of the message
MSR_CRASH_CTL: Final = 0x40000105
CRASH_PARAMETERS: Final = 5
CRASH_NOTIFY: Final = 1 << 63  # of MSR_CRASH_CTL: the guest crashed
CRASH_MESSAGE: Final = 1 << 62  # and left a message

ENABLED: Final = 1 << 0  # of SCONTROL, SIEFP and SIMP
PAGE_MASK: Final = ~0xFFF & (1 << 64) - 1  # of SIEFP and SIMP

# ---- hypercalls: code and flags in the control word, a status in the low 16 bits of the result
CALL_POST_MESSAGE: Final = 0x5C
CALL_SIGNAL_EVENT: Final = 0x5D
CALL_CODE_MASK: Final = 0xFFFF
CALL_FAST: Final = 1 << 16  # the inputs are in registers
CALL_EXTRA_MASK: Final = 0x3FF << 17 | 0xFFF << 32 | 0xFFF << 48  # size of a variable header, repetitions and where they begin

STATUS_SUCCESS: Final = 0
STATUS_INVALID_HYPERCALL_CODE: Final = 2
STATUS_INVALID_HYPERCALL_INPUT: Final = 3
STATUS_INVALID_ALIGNMENT: Final = 4
STATUS_INVALID_PARAMETER: Final = 5
STATUS_INVALID_CONNECTION_ID: Final = 18
STATUS_INSUFFICIENT_BUFFERS: Final = 19

CONNECTION_ID_MASK: Final = 0xFFFFFF
"""Bits of a connection id that count."""

# ---- SynIC
SINTS: Final = 16
MESSAGE_SLOT: Final = 256
"""Bytes of the message page that each SINT has."""
EVENT_FLAGS: Final = 256
"""Bytes of the event flags page that each SINT has: a bit a channel."""
MESSAGE_NONE: Final = 0
MESSAGE_VMBUS: Final = 1
MESSAGE_PENDING: Final = 1 << 8
"""Of the 32 bits behind a slot's type: another message waits, say when this one is taken (by MSR EOM)."""
MAX_PAYLOAD: Final = 240


@struct(size=16)
class SlotHeader(Struct):
    """What a message slot begins with; its payload follows. `message_type` 0: it is free."""

    message_type: U32 = MESSAGE_NONE
    payload_size: U8 = 0
    flags: U8 = 0
    reserved: U16 = 0
    sender: U64 = 0


@struct(size=256)
class PostMessage(Struct):
    """Input of CALL_POST_MESSAGE, aligned to 8 bytes, within one page."""

    connection_id: U32 = 0
    reserved: U32 = 0
    message_type: U32 = 0
    payload_size: U32 = 0
    payload: Annotated[bytes, Raw(MAX_PAYLOAD)] = bytes(MAX_PAYLOAD)


@struct(size=8)
class SignalEvent(Struct):
    """Input of CALL_SIGNAL_EVENT; fast, it is the first parameter."""

    connection_id: U32 = 0
    flag: U16 = 0
    reserved: U16 = 0
