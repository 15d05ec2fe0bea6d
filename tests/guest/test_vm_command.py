"""`vfio-vmbus vm` on a machine with KVM: what a person sees and types, what a script gets, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest

from .conftest import PAYLOADS
from .kvm import KvmGuest
from .packages import Tools
from .shell import shell_image

PAYLOAD = PAYLOADS / "vm_command.py"


@pytest.fixture(scope="module")
def arguments(programs: Tools, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    image = tmp_path_factory.mktemp("image") / "shell.cpio"
    shell_image(programs, image)
    return {"kernel": str(programs.kernel), "image": str(image)}


def test_at_a_terminal(kvm: KvmGuest, arguments: dict[str, str]) -> None:
    found = kvm.run(PAYLOAD, "at_a_terminal", timeout=900, **arguments)
    status = found["status"]
    assert (status["kind"], status["name"], status["unsafe"]) == ("vm", "person", [])
    (client,) = status["clients"]
    assert (client["name"], client["devices"], client["version"], client["channels"]) == ("person", ["nic0"], "5.3", 1)
    (card,) = status["devices"]
    assert (card["mac"], card["isolation"]) == ("00:15:5d:00:00:07", "isolated")
    assert found["terminal"] == "as before"
    assert found["ended"] == 130
    assert found["said"].splitlines()[-1].strip() == "vfio-vmbus: stopped"


def test_in_pipes(kvm: KvmGuest, arguments: dict[str, str]) -> None:
    found = kvm.run(PAYLOAD, "in_pipes", timeout=900, folder="/dev/shm", **arguments)
    assert found["version"] == "4.0"
    assert found["tap"]
    status, out, said = found["taken"]
    assert (status, out) == (2, "")
    assert one_line(said).startswith("vfio-vmbus: TAP vm0 is in use by another process")
    assert found["power-off"] == [0, ""]
    assert ended(found, "panic") == (1, "vfio-vmbus: the guest's kernel panicked: ")
    first, *log = found["panic"][1].splitlines()
    assert first.endswith("kernel panicked: sysrq triggered crash")
    assert any("sysrq: Trigger a crash" in line for line in log), "the log that it left"
    assert ended(found, "signal") == (130, "vfio-vmbus: stopped")
    assert ended(found, "no Hyper-V") == (2, "vfio-vmbus: the guest has not noticed Hyper-V: ")
    status, _, said = found["time-out"]
    assert (status, one_line(said)) == (124, "vfio-vmbus: time-out: still running after 0.2 s")


def test_what_is_refused(kvm: KvmGuest, arguments: dict[str, str]) -> None:
    found = kvm.run(PAYLOAD, "refused", timeout=600, **arguments)
    says = {"no bzImage": "the kernel is no bzImage", "too much memory": "this machine has "}
    assert set(found) == set(says)
    for what, text in says.items():
        status, out, said = found[what]
        assert (status, out) == (2, "")
        assert text in one_line(said)


def one_line(said: str) -> str:
    assert said.count("\n") == 1, said
    return said.strip()


def ended(found: dict[str, Any], how: str) -> tuple[int, str]:
    """Exit status, and how what was said begins: as far as a colon behind which it is the guest's word."""
    status, said = found[how]
    text = said.splitlines()[0]
    head, colon, rest = text.removeprefix("vfio-vmbus: ").partition(": ")
    return status, f"vfio-vmbus: {head}{colon if rest else ''}"
