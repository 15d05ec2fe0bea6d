"""The `vmbus` personality passes the suite of all devices; what is its own is below, and in testing.opened_conformance."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from vfio_vmbus.host.embedded import EmbeddedHost
from vfio_vmbus.testing.leaks import nothing_left
from vfio_vmbus.testing.opened_conformance import OpenedConformance
from vfio_vmbus.vfio.device import Device


@pytest.fixture(scope="module")
def host() -> Iterator[EmbeddedHost]:
    with nothing_left(objects=False), EmbeddedHost(poll="interrupt") as host:
        host.add_nic("card")
        yield host


class TestInProcess(OpenedConformance):
    @pytest.fixture(autouse=True)
    def _host(self, host: EmbeddedHost) -> None:
        self.host = host

    def open(self) -> Device:
        return self.host.attach(self.host.nics["card"], personality="vmbus")
