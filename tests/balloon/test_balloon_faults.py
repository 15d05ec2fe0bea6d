"""The balloon driver on a host with faults: it goes on, or says what is wrong in time, and no page is counted twice."""

from __future__ import annotations

from contextlib import suppress

import pytest

from tests.balloon.balloon_rig import PLENTY
from vfio_vmbus.channel.offered import open_offered
from vfio_vmbus.drivers.balloon.driver import Balloon
from vfio_vmbus.errors import PeerError, UsageError
from vfio_vmbus.host.embedded import EmbeddedHost
from vfio_vmbus.host.faults.plan import FaultPlan
from vfio_vmbus.testing.leaks import nothing_left

LIMIT = 1 << 12
ORDERS = [
    "drop:packets:0.2",
    "duplicate:packets:0.3",
    "corrupt:packets:0.3",
    "delay:packets:0.3:1ms",
    "drop:interrupts:0.3",
    "hostile:headers:0.3",
    "hostile:transactions:0.5",
    "hostile:nvsp:0.5",
]


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("seed", range(3))
def test_it_ends_well_or_in_a_typed_error(order: str, seed: int) -> None:
    with nothing_left(objects=False), EmbeddedHost(faults=FaultPlan.parse([order], seed)) as host:
        balloon = host.add_balloon()
        for _ in range(2):
            with (
                suppress(PeerError),
                open_offered(host.attach(balloon)) as device,
                Balloon(device, limit=LIMIT, pressure=lambda: PLENTY, report=3600.0, timeout=0.2) as driver,
            ):
                for pages in (64, 512, 1):
                    with suppress(UsageError):  # the one before is not answered
                        host.run(lambda pages=pages: balloon.request(pages))
                    driver.serve(0.02)
                    assert 0 <= driver.info.pages <= LIMIT
                    with suppress(UsageError):
                        host.run(lambda: balloon.give_back(16))
                    driver.serve(0.02)
                    assert 0 <= driver.info.pages <= LIMIT
        assert sum(count.seen for count in host.fault_counts()) > 0
