"""A network laboratory without root: namespaces whose TAP interfaces end in this process's descriptors.

The kernel's own TCP/IP stack stands behind each TAP, so ping, HTTP and TCP run through whatever moves the
frames between them. Needs /dev/net/tun and user namespaces; `probe` says why there is none.
"""

from vfio_vmbus.apps.lab.lab import Lab, Namespace, NamespaceSpec, probe
from vfio_vmbus.apps.lab.messages import Download, HttpBody, PingResult, TcpResult
from vfio_vmbus.apps.lab.tap import Tap, open_tap

__all__ = [
    "Download",
    "HttpBody",
    "Lab",
    "Namespace",
    "NamespaceSpec",
    "PingResult",
    "Tap",
    "TcpResult",
    "open_tap",
    "probe",
]
