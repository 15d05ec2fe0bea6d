"""Machines over a real /dev/kvm, with a few instructions or a Linux in them: how each ends, and that nothing of it is left.

What Linux makes of its VMBus is in test_vm_netvsc.
"""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from .conftest import PAYLOADS
from .kvm import KvmGuest
from .packages import Tools
from .shell import shell_image

MACHINE = PAYLOADS / "vm_machine.py"
PATIENCE = 300.0
MIB = 1 << 20

ENDS = {
    "power off": ("power-off", "", "hello"),
    "reset": ("reset", "", ""),
    "keyboard reset": ("reset", "", ""),
    "triple fault": ("reset", "vCPU 0: triple fault", ""),
    "unknown MSR": ("reset", "vCPU 0: triple fault", ""),
    "string output": ("power-off", "", "abc"),
    "no memory": ("power-off", "", "\xff"),
    "beyond memory": ("power-off", "", "\xff"),
    "no port": ("power-off", "", "\xff"),
}


@pytest.fixture(scope="module")
def files(programs: Tools, kvm: KvmGuest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What a Linux boots from: its kernel, and an initramfs with a shell."""
    initrd = tmp_path_factory.mktemp("machine") / "shell.cpio"
    shell_image(programs, initrd, ("nd_e820", "nd_pmem"))
    return {"kernel": str(programs.kernel), "initrd": str(initrd)}


def test_a_guest_that_is_a_few_instructions(kvm: KvmGuest) -> None:
    payload = kvm.start(MACHINE, "without_linux", timeout=PATIENCE)
    found = {}
    for _ in range(len(ENDS) + 2):
        name, reason, text, said = payload.report(PATIENCE)
        found[name] = (reason, text, said)
    payload.result(PATIENCE)
    assert found["every port"][0] == "power-off"
    assert found["no code there"][0] == "failed"
    assert "cannot emulate at 0xe0000000" in found["no code there"][1]
    assert {name: found[name] for name in ENDS} == ENDS


def test_a_guest_that_never_ends_is_stopped(kvm: KvmGuest) -> None:
    expected = ["time-out", "time-out", "time-out", "stopped", "stopped"]
    assert kvm.run(MACHINE, "stopping", timeout=PATIENCE) == expected


def test_what_cannot_be_a_machine_is_one_line(kvm: KvmGuest) -> None:
    words = [
        "no bzImage",
        "kernel /nonexistent cannot be read",
        "initrd /nonexistent cannot be read",
        "initrd has 67108864 bytes",
        "0 CPUs",
        "100000 CPUs",
        "memory of 1073741824 MiB: this machine has",
        "multiple of 2 MiB",
        "command line has 300 bytes",
        "/nonexistent cannot be persistent memory",
        "starts once",
    ]
    found = kvm.run(MACHINE, "refusals", timeout=PATIENCE)
    assert len(found) == len(words)
    for word, text in zip(words, found, strict=True):
        assert word in text
        assert "\n" not in text


def test_linux_with_two_cpus_and_a_person_at_its_console(kvm: KvmGuest, files: dict[str, str]) -> None:
    do = ["nproc", "cat /proc/cmdline", "dmesg | grep -c 'Hypervisor detected: Microsoft Hyper-V'", "poweroff -f"]
    payload = kvm.start(MACHINE, "linux", timeout=PATIENCE, **files, cpus=2, do=do)
    print(f"two CPUs: user space after {payload.report(PATIENCE)} s")
    answers, reason, text = payload.result(PATIENCE)
    assert answers == ["2", "console=ttyS0 quiet mitigations=off", "1"]
    assert (reason, text) == ("power-off", "")


@pytest.mark.parametrize("words", ["panic=-1", "panic=0"], ids=["restarts", "stands still"])
def test_a_panic_is_told_with_its_text(kvm: KvmGuest, files: dict[str, str], words: str) -> None:
    """It leaves its log with Hyper-V."""
    words = f"console=ttyS0 quiet mitigations=off {words}"
    _, reason, text = kvm.run(MACHINE, "linux", timeout=PATIENCE, **files, words=words, do=["echo c >/proc/sysrq-trigger"])
    assert reason == "panic"
    assert "Kernel panic - not syncing: sysrq triggered crash" in text


def test_images_are_persistent_memory_that_is_forgotten(kvm: KvmGuest, files: dict[str, str], tmp_path: Path) -> None:
    folder, image = tmp_path / "content", tmp_path / "image"
    folder.mkdir()
    (folder / "hello").write_text("from a disk\n")
    made = subprocess.run(["mke2fs", "-q", "-t", "ext4", "-d", folder, image, "8M"], capture_output=True, text=True, check=False)
    assert made.returncode == 0, made.stderr
    second = tmp_path / "second"
    second.write_bytes(b"x" * (3 * MIB))
    before = image.read_bytes()
    do = [
        "cat /sys/block/pmem1/size",
        "mkdir /mnt && mount /dev/pmem0 /mnt && cat /mnt/hello",
        "echo changed >/mnt/hello && umount /mnt && mount /dev/pmem0 /mnt && cat /mnt/hello",
        "reboot -f",
    ]
    answers, reason, _ = kvm.run(MACHINE, "linux", timeout=PATIENCE, **files, pmem=[str(image), str(second)], do=do)
    assert answers == [str(4 * MIB // 512), "from a disk", "changed"]
    assert reason == "reset"
    assert image.read_bytes() == before


def test_code_that_is_noise(kvm: KvmGuest) -> None:
    found = kvm.run(MACHINE, "noise", timeout=PATIENCE, seed=5, count=20)
    assert len(found) == 20
    assert set(found) <= {"reset", "failed", "time-out", "power-off"}


def test_a_guest_of_hyper_v_that_says_anything(kvm: KvmGuest) -> None:
    reason, text, errors = kvm.run(MACHINE, "hyperv_noise", timeout=PATIENCE, seed=6, count=2000)
    assert (reason, text) == ("power-off", "")
    assert errors > 0
