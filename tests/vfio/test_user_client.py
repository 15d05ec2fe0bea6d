"""The device over a socket passes the suite of all devices, with its server in another thread."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.vfio.user_client_rig import PATIENCE, attach
from vfio_vmbus.host.embedded import EmbeddedHost
from vfio_vmbus.testing.conformance import VmbusFunctionConformance
from vfio_vmbus.testing.leaks import nothing_left
from vfio_vmbus.vfio.device import Device
from vfio_vmbus.vfio.user_client import UserDevice


@pytest.fixture(scope="module")
def host() -> Iterator[EmbeddedHost]:
    with nothing_left(objects=False), EmbeddedHost(poll="interrupt") as host:
        host.add_nic("card")
        yield host


class TestUserDevice(VmbusFunctionConformance):
    @pytest.fixture(autouse=True)
    def _host(self, host: EmbeddedHost) -> None:
        self.host = host

    def open(self) -> Device:
        return UserDevice(attach(self.host, self.host.nics["card"]), timeout=PATIENCE)
