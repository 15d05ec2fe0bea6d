"""The payload of vfio-user's VERSION: a version and a JSON text of what its sender can do.

    {"capabilities": {"max_msg_fds": 8, "max_data_xfer_size": 1048576, ...}}

Members that nobody here knows are ignored, as programs send some of their own. A text may end with a NUL, or be missing.
Sources: QEMU's docs/interop/vfio-user.rst (10.2); limits from hw/vfio-user/proxy.c, which refuses servers beyond them.
"""

import msgspec

from vfio_vmbus.errors import ProtocolError, UsageError
from vfio_vmbus.wire.layout import Buffer
from vfio_vmbus.wire.vfio_user import MAX_VERSION_PAYLOAD, Version

DEFAULT_MAX_DATA = 1 << 20
PAGE_SIZES = 4096

MAX_SERVER_PAYLOAD = 198
"""Bytes of a server's VERSION payload: QEMU takes no reply longer than its own request, which has 214 with the header."""

LIMITS = {
    "max_msg_fds": (0, 1024),
    "max_data_xfer_size": (1, 64 << 20),
    "max_dma_maps": (1, 1 << 32),
    "pgsizes": (1, (1 << 64) - 1),
}
"""Least and largest of each number that is taken from the other side."""


class Capabilities(msgspec.Struct, frozen=True, kw_only=True):
    """max_msg_fds: descriptors in one message to the sender. max_data_xfer_size: bytes of data in one message. pgsizes: a bit for each
    page size of DMA maps. write_multiple: takes REGION_WRITE_MULTI. What is missing has the specification's default."""

    max_msg_fds: int = 1
    max_data_xfer_size: int = DEFAULT_MAX_DATA
    max_dma_maps: int = 65535
    pgsizes: int = PAGE_SIZES
    write_multiple: bool = False


class _Text(msgspec.Struct, frozen=True):
    capabilities: Capabilities = Capabilities()


_decoder = msgspec.json.Decoder(_Text)


def decode_version(payload: Buffer) -> tuple[Version, Capabilities]:
    """A VERSION payload. Raises ProtocolError for one that is too short, too long, no such JSON, or has numbers beyond LIMITS."""
    if len(payload) > MAX_VERSION_PAYLOAD:
        raise ProtocolError(f"VERSION: {len(payload)} bytes, limit {MAX_VERSION_PAYLOAD}")
    version = Version.unpack(payload)
    text = bytes(payload[Version.SIZE :]).removesuffix(b"\0")
    if not text:
        return version, Capabilities()
    try:
        capabilities = _decoder.decode(text).capabilities
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ProtocolError(f"VERSION: {text[:80]!r} is no JSON of capabilities: {error}") from error
    for name, (least, most) in LIMITS.items():
        value = getattr(capabilities, name)
        if not least <= value <= most:
            raise ProtocolError(f"VERSION: {name} is {value}, need {least} to {most}")
    return version, capabilities


def encode_version(version: Version, capabilities: Capabilities, *, limit: int = MAX_VERSION_PAYLOAD) -> bytes:
    """A VERSION payload with its NUL. Raises UsageError beyond `limit` bytes; a server's is MAX_SERVER_PAYLOAD."""
    payload = version.pack() + msgspec.json.encode(_Text(capabilities)) + b"\0"
    if len(payload) > limit:
        raise UsageError(f"VERSION: {len(payload)} bytes, limit {limit}")
    return payload
