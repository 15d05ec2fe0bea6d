"""What the tests of this folder share: the programs, one guest for all of them."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from vfio_vmbus.apps.lab import Lab, Namespace, NamespaceSpec
from vfio_vmbus.errors import UnavailableError

from .bare import BareGuest
from .kernels import compiled
from .kvm import KvmGuest
from .modules import with_modules
from .nested import HyperVGuest
from .packages import CACHE, Tools, tools
from .run import Guest, bridged_devices, edu_device, nvme_device, user_device
from .server import Server
from .shell import shell_image

PAYLOADS = Path(__file__).with_name("payloads")


@pytest.fixture(scope="session")
def programs() -> Tools:
    try:
        return tools()
    except UnavailableError as error:
        pytest.skip(f"QEMU and a guest's kernel cannot be had: {error}")


@pytest.fixture
def short_folder() -> Iterator[Path]:
    """A folder for logs and sockets, whose names must be short."""
    with tempfile.TemporaryDirectory(prefix="rig-") as folder:
        yield Path(folder)


@pytest.fixture(scope="session")
def outside() -> Iterator[Namespace | str]:
    """A network namespace on this side of the switch, or why the machine allows none."""
    with ExitStack() as stack:
        try:
            lab = stack.enter_context(Lab(NamespaceSpec("outside", "10.77.0.1/24")))
        except UnavailableError as error:
            yield str(error)
        else:
            yield lab.namespaces[0]


@pytest.fixture(scope="session")
def guest_server(programs: Tools, outside: Namespace | str) -> Iterator[Server]:
    """The server of the guest's card, whose switch has a port in the namespace outside."""
    tap = -1 if isinstance(outside, str) else outside.tap.fd
    with tempfile.TemporaryDirectory(prefix="rig-") as folder, Server(Path(folder), tap) as server:
        yield server


@pytest.fixture(scope="session")
def guest(programs: Tools, guest_server: Server) -> Iterator[Guest]:
    """A guest that has booted, with what our server serves, a card and an edu, and QEMU's own edu, NVMe controller and a bridge."""
    kernels = compiled(CACHE / "kernels")
    devices = [*user_device(guest_server.path), *user_device(guest_server.edu_path, "vu1", 7), *edu_device()]
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="rig-")))
        guest = stack.enter_context(Guest(programs, folder, kernels, [*devices, *nvme_device(folder), *bridged_devices()]))
        guest_server.event("attached")
        print(guest.hello)
        yield guest


@pytest.fixture(scope="module")
def hyperv(programs: Tools) -> Iterator[HyperVGuest]:
    """A guest on Hyper-V that has booted, its balloon driven by hv_balloon. A boot a file: what was done once (a class told to a driver,
    a taint) stays.
    """
    with tempfile.TemporaryDirectory(prefix="rig-") as folder, HyperVGuest(programs, Path(folder)) as guest:
        print(guest.hello)
        yield guest


@pytest.fixture(scope="session")
def built(programs: Tools) -> Tools | str:
    """The programs with a kernel that has VFIO without an IOMMU and igb_uio, or why they cannot be had."""
    try:
        return with_modules(programs)
    except UnavailableError as error:
        return str(error)


@pytest.fixture(scope="session")
def beyond() -> Iterator[Namespace | str]:
    """As `outside`, for the other guest."""
    with ExitStack() as stack:
        try:
            lab = stack.enter_context(Lab(NamespaceSpec("beyond", "10.78.0.1/24")))
        except UnavailableError as error:
            yield str(error)
        else:
            yield lab.namespaces[0]


@pytest.fixture(scope="session")
def bare(programs: Tools, built: Tools | str, beyond: Namespace | str) -> Iterator[BareGuest]:
    """A guest without an IOMMU that has booted; one for all files, of which test_noiommu.py is the first: a taint stays."""
    tools = programs if isinstance(built, str) else built
    tap = -1 if isinstance(beyond, str) else beyond.tap.fd
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="rig-")))
        server = stack.enter_context(Server(folder, tap))
        guest = stack.enter_context(BareGuest(tools, folder, server.path))
        server.event("attached")
        print(guest.hello)
        yield guest


@pytest.fixture
def unlocked(bare: BareGuest, built: Tools | str) -> BareGuest:
    """The same, where it has those modules."""
    if isinstance(built, str):
        pytest.skip(f"modules that Debian does not build cannot be had: {built}")
    return bare


@pytest.fixture(scope="session")
def kvm(programs: Tools) -> Iterator[KvmGuest]:
    """A guest that has booted, with a /dev/kvm of its own."""
    with (
        tempfile.TemporaryDirectory(prefix="rig-") as folder,
        KvmGuest(programs, Path(folder), compiled(CACHE / "kernels")) as guest,
    ):
        print(guest.hello)
        yield guest


@pytest.fixture(scope="session")
def images(programs: Tools, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What a virtual machine of ours in `kvm` boots from: a kernel, and an initramfs with a shell."""
    image = tmp_path_factory.mktemp("image") / "shell.cpio"
    shell_image(programs, image)
    return {"kernel": str(programs.kernel), "initrd": str(image)}
