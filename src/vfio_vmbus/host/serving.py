"""`HostServer`: devices of an embedded host for other processes, by vfio-user. The place where the host and the server meet."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Collection
from contextlib import suppress

from ..errors import ClosedError, RefusedError, UsageError
from ..vfio.user.connection import Claim, Client, ServerLimits
from ..vfio.user.device import FunctionDevice, ServedDevice
from ..vfio.user.server import ServerEvent, UserServer
from .embedded import EmbeddedHost, check_personality
from .vsp import Vsp


class HostServer:
    """Runs on the host's loop, from the moment it is made until `close` or the host's end. Methods may be called from any thread.

    limits: of each client. function_limits: of its memory, as of Domain (max_maps, max_bytes). events: called on the host's loop.
    """

    def __init__(
        self,
        host: EmbeddedHost,
        *,
        limits: ServerLimits | None = None,
        allow_uids: Collection[int] = (),
        events: Callable[[ServerEvent], None] = lambda event: None,
        **function_limits: int,
    ) -> None:
        self.host = host
        self._function_limits = function_limits
        self.server = host.run(lambda: UserServer(limits=limits, allow_uids=allow_uids, events=events))
        host.at_close(self.server.close)

    def listen(self, path: str | os.PathLike[str], *devices: Vsp, mode: int = 0o600, personality: str = "pci") -> None:
        """Serve these devices to whoever connects at `path`. personality: how they look, as of EmbeddedHost.attach.

        Raises UsageError where that cannot be.
        """
        self.host.run(lambda: self.server.listen(path, self._claim(devices, personality), mode=mode))

    def adopt(self, fd: int, *devices: Vsp, personality: str = "pci") -> None:
        """The same on an inherited socket, which listens or is connected to the client. Raises UsageError for other descriptors."""
        self.host.run(lambda: self.server.adopt(fd, self._claim(devices, personality)))

    @property
    def idle(self) -> bool:
        """Is there no client, and none can come? So it is when an inherited connection has ended."""
        return self.server.idle

    def close(self) -> None:
        """End all connections, stop listening."""
        with suppress(ClosedError):  # with the host
            self.host.run(self.server.close)

    def __enter__(self) -> HostServer:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _claim(self, devices: tuple[Vsp, ...], personality: str) -> Claim:
        """How a client gets a device: the one place that knows what it is shown as. Raises UsageError for no personality of these."""
        check_personality(personality, devices)

        def claim(client: Client) -> ServedDevice:
            try:
                function, released = self.host.make_function(
                    *devices, name=client.name, personality=personality, **self._function_limits
                )
            except UsageError as error:  # somebody has it by another way
                raise RefusedError(str(error), errno.EBUSY) from error
            return FunctionDevice(function, released)

        return claim
