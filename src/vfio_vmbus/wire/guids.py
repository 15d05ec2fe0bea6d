"""Class GUIDs: what kind of device an offer is. Source: include/linux/hyperv.h."""

from collections.abc import Mapping
from types import MappingProxyType
from uuid import UUID

CLASS_GUIDS: Mapping[str, UUID] = MappingProxyType(
    {
        "network": UUID("f8615163-df3e-46c5-913f-f2d2f965ed0e"),
        "scsi": UUID("ba6163d9-04a1-4d29-b605-72e2ffb1dc7f"),
        "ide": UUID("32412632-86cb-44a2-9b5c-50d1417354f5"),
        "fibre-channel": UUID("2f9bcc4a-0069-4af3-b76b-6fd0be528cda"),
        "network-direct": UUID("8c2eaf3d-32a7-4b09-ab99-bd1f1c86b501"),
        "pci": UUID("44c4f61d-4444-4400-9d52-802e27ede19f"),
        "video": UUID("da0a7802-e377-4aac-8e77-0558eb1073f8"),
        "keyboard": UUID("f912ad6d-2b17-48ea-bd65-f927a61c7684"),
        "mouse": UUID("cfa8b69e-5b4a-4cc0-b98b-8ba1a1f3f95a"),
        "balloon": UUID("525074dc-8985-46e2-8057-a307dc18a502"),
        "kvp": UUID("a9a0f4e7-5a45-4d96-b827-8a841e8c03e6"),
        "vss": UUID("35fa2e29-ea23-4236-96ae-3a6ebacba440"),
        "time": UUID("9527e630-d0ae-497b-adce-e80ab0175caf"),
        "heartbeat": UUID("57164f39-9115-4e78-ab55-382f3bd5422d"),
        "shutdown": UUID("0e0b6031-5213-4934-818b-38d90ced39db"),
        "file-copy": UUID("34d14be3-dee4-41c8-9ae7-6b174977c192"),
        "activation": UUID("3375baf4-9e15-4b30-b765-67acb10d607b"),
        "activation-old": UUID("f8e65716-3cb3-4a06-9a60-1889c5cccab5"),
        "remote-desktop": UUID("276aacf4-ac15-426c-98dd-7521ad3f01fe"),
        "machine-config": UUID("c376c1c3-d276-48d2-90a9-c04748072c60"),
    }
)
CLASS_NETWORK = CLASS_GUIDS["network"]
CLASS_SCSI = CLASS_GUIDS["scsi"]
CLASS_BALLOON = CLASS_GUIDS["balloon"]
CLASS_NAMES: Mapping[UUID, str] = MappingProxyType({guid: name for name, guid in CLASS_GUIDS.items()})

OTHER_CLASSES: Mapping[UUID, str] = MappingProxyType(
    {
        UUID("8b60ccf6-709f-4c11-90b5-229c959a9e6a"): "serial",
        UUID("427b03e7-4ceb-4286-b5fc-486f4a1dd439"): "crash-dump",
        UUID("7050ebf0-1dbf-4528-838e-f7e10089fc4b"): "crash-dump",
        UUID("2a88c08d-55a9-4e1b-ac6e-0d086abf4e62"): "crash-dump",
        UUID("8dedd1aa-9056-49e4-bfd6-1bf90dc38ef0"): "guest-emulation",
        UUID("d3e4454d-62af-44ec-b851-3170915e5f56"): "guest-emulation-transport",
        UUID("aa5de534-d149-487a-9053-05972ba20a7c"): "guest-emulation-log",
        UUID("6e382d18-3336-4f4b-acc4-2b7703d4df4a"): "gpu",
        UUID("dde9cbc0-5060-4436-9448-ea1254a5d177"): "gpu-global",
    }
)
"""Classes that Linux has no driver for (OpenVMM, vm/devices: vmbus_serial_protocol, get_protocol; include/linux/hyperv.h of OpenHCL's
kernel and, for parts of a GPU, of WSL's)."""

_SOCKET_TAIL = "-facb-11e6-bd58-64006a7986d3"
"""A Hyper-V socket's class is the service's GUID: its port, then this (net/vmw_vsock/hyperv_transport.c)."""


def class_name(guid: UUID) -> str:
    """What a device of this class is: a word of the tables above, "socket:PORT", or the GUID itself."""
    known = CLASS_NAMES.get(guid) or OTHER_CLASSES.get(guid)
    if known is None and str(guid).endswith(_SOCKET_TAIL):
        known = f"socket:{guid.time_low}"
    return known or str(guid)
