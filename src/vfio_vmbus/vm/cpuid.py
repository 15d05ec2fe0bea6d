"""What CPUID tells the guest: KVM's own list with the topology put right, and Hyper-V instead of KVM behind 0x40000000.

Sources: Intel SDM volume 2A (CPUID), AMD APM volume 3 appendix E; TLFS, "Feature and Interface Discovery".
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Final

from ..wire.kvm import CPUID_SIGNIFICANT_INDEX, CpuidEntry

FEATURES: Final = 1
CACHES: Final = 4
EXTENDED_FEATURES: Final = 7
TOPOLOGY: Final = 0xB
XSTATE: Final = 0xD
HYPERVISOR: Final = 0x40000000
HYPERVISOR_END: Final = 0x40010000
AMD_FEATURES: Final = 0x80000001
WIDTHS: Final = 0x80000008
AMD_CACHES: Final = 0x8000001D
AMD_TOPOLOGY: Final = 0x8000001E

_TOPOLOGY_OF_OTHERS: Final = (0x1F, 0x80000026)
"""Newer forms of TOPOLOGY, which guests do without."""

_HTT: Final = 1 << 28
_X2APIC: Final = 1 << 21
_TSC_DEADLINE: Final = 1 << 24
_HYPERVISOR_PRESENT: Final = 1 << 31
_CMP_LEGACY: Final = 1 << 1

_XSAVE_1C: Final = 1 << 12 | 1 << 26 | 1 << 27 | 1 << 28 | 1 << 29  # FMA, XSAVE, OSXSAVE, AVX, F16C
_XSAVE_7B: Final = 1 << 5 | 1 << 14 | 1 << 16 | 1 << 17 | 1 << 21 | 1 << 28 | 1 << 30 | 1 << 31  # AVX2, MPX, AVX-512
_XSAVE_7C: Final = 1 << 1 | 1 << 3 | 1 << 6 | 1 << 9 | 1 << 10 | 1 << 11 | 1 << 12 | 1 << 14  # PKU, VAES, VPCLMULQDQ, AVX-512
_XSAVE_7D: Final = 1 << 2 | 1 << 3 | 1 << 8 | 1 << 22 | 1 << 23 | 1 << 24 | 1 << 25  # AVX-512, AMX
_XSAVE_81C: Final = 1 << 11 | 1 << 15 | 1 << 16  # XOP, LWP, FMA4


def address_bits(supported: Sequence[CpuidEntry]) -> int:
    """How wide a guest-physical address can be."""
    return next((entry.eax & 0xFF for entry in supported if entry.function == WIDTHS), 36)


def for_vcpu(
    supported: Sequence[CpuidEntry], index: int, cpus: int, hypervisor: Sequence[CpuidEntry] | None, *, xsave: bool = True
) -> list[CpuidEntry]:
    """The CPUID of vCPU `index` of `cpus`: all are cores of one package, with a thread each.

    supported: of KVM. hypervisor: what is said from 0x40000000 on instead of what KVM says of itself; Linux takes the first hypervisor
    that it knows, so no leaf of KVM's may stay. xsave: False hides it, and all that needs it.
    """
    entries = [
        _adjusted(entry, index, cpus)
        for entry in supported
        if entry.function not in (TOPOLOGY, *_TOPOLOGY_OF_OTHERS)
        and not (hypervisor is not None and HYPERVISOR <= entry.function < HYPERVISOR_END)
    ]
    if not xsave:
        entries = [_without_xsave(entry) for entry in entries if entry.function != XSTATE]
    return [*entries, *_topology(index, cpus), *(hypervisor or ())]


def _adjusted(entry: CpuidEntry, index: int, cpus: int) -> CpuidEntry:
    function = entry.function
    if function == FEATURES:
        ebx = entry.ebx & 0xFFFF | min(cpus, 255) << 16 | index << 24
        edx = entry.edx | _HTT if cpus > 1 else entry.edx & ~_HTT
        return replace(entry, ebx=ebx, ecx=entry.ecx | _HYPERVISOR_PRESENT | _X2APIC | _TSC_DEADLINE, edx=edx)
    if function == CACHES and entry.eax & 0x1F:
        sharing = cpus - 1 if entry.eax >> 5 & 7 >= 3 else 0  # the third level is everyone's
        return replace(entry, eax=entry.eax & 0x3FFF | sharing << 14 | min(cpus - 1, 63) << 26)
    if function == AMD_FEATURES:
        return replace(entry, ecx=entry.ecx | _CMP_LEGACY if cpus > 1 else entry.ecx & ~_CMP_LEGACY)
    if function == WIDTHS:
        return replace(entry, ecx=entry.ecx & ~0xFFFF | _id_bits(cpus) << 12 | min(cpus - 1, 255))
    if function == AMD_CACHES and entry.eax & 0x1F:
        sharing = cpus - 1 if entry.eax >> 5 & 7 >= 3 else 0
        return replace(entry, eax=entry.eax & 0x3FFF | sharing << 14)
    if function == AMD_TOPOLOGY:
        return replace(entry, eax=index, ebx=index & 0xFF, ecx=0)
    return entry


def _id_bits(cpus: int) -> int:
    """Bits of an APIC id that tell cores apart."""
    return (cpus - 1).bit_length()


def _topology(index: int, cpus: int) -> list[CpuidEntry]:
    """Leaf 0xb: a level for threads, one for cores, and the end."""
    levels = ((0, 1, 1), (_id_bits(cpus), cpus, 2), (0, 0, 0))
    return [
        CpuidEntry(
            function=TOPOLOGY,
            index=level,
            flags=CPUID_SIGNIFICANT_INDEX,
            eax=shift,
            ebx=count,
            ecx=kind << 8 | level,
            edx=index,
        )
        for level, (shift, count, kind) in enumerate(levels)
    ]


def _without_xsave(entry: CpuidEntry) -> CpuidEntry:
    if entry.function == FEATURES:
        return replace(entry, ecx=entry.ecx & ~_XSAVE_1C)
    if entry.function == EXTENDED_FEATURES and entry.index == 0:
        return replace(entry, ebx=entry.ebx & ~_XSAVE_7B, ecx=entry.ecx & ~_XSAVE_7C, edx=entry.edx & ~_XSAVE_7D)
    if entry.function == EXTENDED_FEATURES:  # vector instructions, all of it
        return replace(entry, eax=0, ebx=0, ecx=0, edx=0)
    if entry.function == AMD_FEATURES:
        return replace(entry, ecx=entry.ecx & ~_XSAVE_81C)
    return entry
