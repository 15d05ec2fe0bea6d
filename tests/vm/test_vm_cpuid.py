"""What the guest's CPUs say about themselves, read as Linux reads it."""

from __future__ import annotations

import pytest

from vfio_vmbus.vm import cpuid, host_cpu
from vfio_vmbus.wire.kvm import CPUID_SIGNIFICANT_INDEX, CpuidEntry

ALL = 0xFFFFFFFF
SUPPORTED = [
    CpuidEntry(function=0, eax=0x10),
    CpuidEntry(function=1, ebx=0x99990800, ecx=ALL & ~(1 << 31 | 1 << 21), edx=ALL),
    CpuidEntry(function=4, index=0, flags=1, eax=0xFFFFC121),
    CpuidEntry(function=4, index=3, flags=1, eax=0xFFFFC163),
    CpuidEntry(function=4, index=4, flags=1),
    CpuidEntry(function=7, index=0, flags=1, eax=1, ebx=ALL, ecx=ALL, edx=ALL),
    CpuidEntry(function=7, index=1, flags=1, eax=ALL),
    CpuidEntry(function=0xB, index=0, flags=1, edx=77),
    CpuidEntry(function=0xB, index=1, flags=1, edx=77),
    CpuidEntry(function=0xD, index=0, flags=1, eax=7),
    CpuidEntry(function=0x1F, index=0, flags=1, edx=77),
    CpuidEntry(function=0x40000000, eax=0x40000001, ebx=0x4B4D564B, ecx=0x564B4D56, edx=0x4D),
    CpuidEntry(function=0x40000001, eax=ALL),
    CpuidEntry(function=0x80000001, ecx=ALL),
    CpuidEntry(function=0x80000008, eax=0x3030, ecx=0x7FFF),
    CpuidEntry(function=0x8000001D, index=3, flags=1, eax=0xFFFFC163),
    CpuidEntry(function=0x8000001E, eax=77, ebx=0x0107, ecx=3),
    CpuidEntry(function=0x80000026, index=0, flags=1, edx=77),
]
HYPERV = [CpuidEntry(function=0x40000000, ebx=0x7263694D), CpuidEntry(function=0x40000001, eax=0x31237648)]


def leaf(entries: list[CpuidEntry], function: int, index: int = 0) -> CpuidEntry:
    found = [entry for entry in entries if entry.function == function and entry.index == index]
    assert len(found) == 1, f"{function:#x}.{index}"
    return found[0]


@pytest.mark.parametrize("cpus", [1, 2, 3, 8, 254])
def test_every_cpu_is_a_core_of_one_package(cpus: int) -> None:
    packages = set()
    for index in range(cpus):
        entries = cpuid.for_vcpu(SUPPORTED, index, cpus, None)
        features = leaf(entries, 1)
        assert (features.ebx >> 24, features.ebx >> 16 & 0xFF, features.ebx & 0xFFFF) == (index, cpus, 0x0800)
        assert features.edx >> 28 & 1 == (cpus > 1)
        threads, cores, end = (leaf(entries, 0xB, level) for level in range(3))
        assert (threads.eax, threads.ebx, threads.ecx) == (0, 1, 0x100)
        assert (cores.ebx, cores.ecx, end.ebx, end.ecx) == (cpus, 0x201, 0, 2)
        assert {level.edx for level in (threads, cores, end)} == {index}
        assert {level.flags for level in (threads, cores, end)} == {CPUID_SIGNIFICANT_INDEX}
        packages.add(index >> cores.eax)
        assert 1 << cores.eax >= cpus
        widths = leaf(entries, 0x80000008)
        assert (widths.ecx & 0xFF, widths.ecx >> 12 & 0xF, widths.eax) == (cpus - 1, cores.eax, 0x3030)
        assert (leaf(entries, 0x8000001E).eax, leaf(entries, 0x8000001E).ebx >> 8) == (index, 0), "a thread a core"
        assert not [entry for entry in entries if entry.function in (0x1F, 0x80000026)]
    assert packages == {0}


def test_caches_are_shared_from_the_third_level_on() -> None:
    entries = cpuid.for_vcpu(SUPPORTED, 0, 4, None)
    assert [leaf(entries, 4, index).eax >> 14 & 0xFFF for index in (0, 3)] == [0, 3]
    assert leaf(entries, 4, 0).eax >> 26 == 3
    assert leaf(entries, 4, 4).eax == 0
    assert leaf(entries, 0x8000001D, 3).eax >> 14 & 0xFFF == 3


def test_hyperv_stands_where_kvm_was() -> None:
    entries = cpuid.for_vcpu(SUPPORTED, 0, 1, HYPERV)
    assert [entry for entry in entries if 0x40000000 <= entry.function < 0x50000000] == HYPERV
    assert leaf(entries, 1).ecx >> 31
    assert leaf(cpuid.for_vcpu(SUPPORTED, 0, 1, None), 0x40000000).ebx == 0x4B4D564B, "a bare guest knows of KVM"


def test_without_xsave_nothing_is_left_that_needs_it() -> None:
    entries = cpuid.for_vcpu(SUPPORTED, 0, 1, HYPERV, xsave=False)
    features = leaf(entries, 1)
    for name, bit in {"fma": 12, "xsave": 26, "osxsave": 27, "avx": 28, "f16c": 29}.items():
        assert not features.ecx >> bit & 1, name
    for name, bit in {"ssse3": 9, "sse4_2": 20, "x2apic": 21, "aes": 25, "rdrand": 30}.items():
        assert features.ecx >> bit & 1, name
    more = leaf(entries, 7)
    for name, bit in {"avx2": 5, "avx512f": 16, "avx512vl": 31}.items():
        assert not more.ebx >> bit & 1, name
    for name, bit in {"fsgsbase": 0, "bmi1": 3, "smep": 7, "smap": 20, "sha_ni": 29}.items():
        assert more.ebx >> bit & 1, name
    assert not more.ecx >> 3 & 1, "protection keys live in XSAVE's area"
    assert leaf(entries, 7, 1).eax == 0
    assert not [entry for entry in entries if entry.function == 0xD]
    assert [entry for entry in cpuid.for_vcpu(SUPPORTED, 0, 1, None) if entry.function == 0xD]


def test_the_width_of_addresses() -> None:
    assert cpuid.address_bits(SUPPORTED) == 0x30
    assert cpuid.address_bits([]) == 36


def test_this_machines_own_cpuid_can_be_read() -> None:
    leaves, *name = host_cpu.cpuid(0)
    vendor = b"".join(name[index].to_bytes(4, "little") for index in (0, 2, 1)).decode()
    with open("/proc/cpuinfo") as file:
        assert f": {vendor}\n" in file.read()
    assert leaves >= 1
    assert isinstance(host_cpu.emulated(), bool)
