"""A guest that runs before its host is there."""

from __future__ import annotations

import subprocess
import sys

import pytest
from synic_guest import SynicGuest

from vfio_vmbus.errors import LocalError, UsageError
from vfio_vmbus.host.embedded import EmbeddedHost
from vfio_vmbus.testing.leaks import nothing_left
from vfio_vmbus.wire import hyperv
from vfio_vmbus.wire import vmbus as wire

CONTACT = wire.InitiateContact(version_requested=wire.SUPPORTED_VERSIONS[0]).pack()


def test_messages_are_to_be_tried_again_until_the_host_comes() -> None:
    with nothing_left(objects=False), SynicGuest(None) as guest:
        guest.enable()
        assert guest.post(CONTACT) == hyperv.STATUS_INSUFFICIENT_BUFFERS
        assert guest.signal(1) == hyperv.STATUS_INVALID_CONNECTION_ID
        with pytest.raises(LocalError, match="no machine yet"):
            _ = guest.hyperv.connection
        with EmbeddedHost(poll="interrupt") as host:
            card = host.add_nic("nic")
            with pytest.raises(UsageError, match="no host yet"):
                guest.hyperv.offer(card)
            guest.hyperv.attach(host, card)
            guest.connect().ping()
            assert guest.hear(wire.OfferChannel).child_relid == 1
            with pytest.raises(UsageError, match="has a host already"):
                guest.hyperv.attach(host)
            guest.close()


def test_a_synic_that_moved_before_is_where_it_is_now() -> None:
    with EmbeddedHost(poll="interrupt") as host, SynicGuest(None) as guest:
        guest.enable(messages=0x700000)
        guest.disable()
        guest.enable()
        guest.hyperv.attach(host)
        assert guest.contact().version_supported == 1  # heard without another word of the SynIC's


def test_a_device_that_somebody_has_leaves_the_guest_without_a_host() -> None:
    with EmbeddedHost(poll="interrupt") as host, nothing_left(objects=False):
        card = host.add_nic("nic")
        with SynicGuest(host, card), SynicGuest(None) as guest:
            guest.enable()
            for _ in range(2):
                with pytest.raises(UsageError, match="has a client already"):
                    guest.hyperv.attach(host, card)
            assert guest.post(CONTACT) == hyperv.STATUS_INSUFFICIENT_BUFFERS
            guest.hyperv.attach(host)
            assert guest.contact().version_supported == 1


def test_a_host_without_a_machine() -> None:
    from vfio_vmbus.vm.hyperv import Hyperv

    with EmbeddedHost(poll="interrupt") as host, pytest.raises(UsageError, match="no machine yet"):
        Hyperv().attach(host)


def test_the_machine_loads_no_data_plane() -> None:
    """So that a guest boots while it loads."""
    program = (
        "import sys, vfio_vmbus.vm.hyperv, vfio_vmbus.vm.machine; print(sorted({'numba', 'numpy', 'asyncio'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
