"""How much one side lets the other side ask for."""

from dataclasses import dataclass

from vfio_vmbus.wire.vmbus import MAX_RELID, VP_INDEX_DISABLE_INTERRUPT


@dataclass(frozen=True, slots=True)
class HostLimits:
    """What one guest may take of the host. Beyond the GPADL limits a request is answered with a failure; `max_unfinished`
    and `max_bodies`, which no guest reaches by being busy, are fatal to its connection.
    """

    max_offers: int = 256  # channels, subchannels included; the host's own limit
    max_gpadls: int = 1024
    max_gpadl_pages: int = 8190  # pages of 4096 bytes; what a GPADL of one range can have
    max_total_pages: int = 1 << 18  # over all GPADLs: 1 GiB
    max_unfinished: int = 64  # GPADLs whose bodies are still coming
    max_bodies: int = 512  # messages of one GPADL behind its header; 292 when each is full
    target_vps: int = VP_INDEX_DISABLE_INTERRUPT  # processors, or interrupt vectors: 0..target_vps-1


@dataclass(frozen=True, slots=True)
class GuestLimits:
    """What a guest believes of a host."""

    max_offers: int = MAX_RELID  # channels that are offered and not yet released
