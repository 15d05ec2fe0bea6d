"""The thread that waits for what a vfio-user server asks for by itself, while its client has no command under way."""

from __future__ import annotations

import os
import select
import threading
from collections.abc import Callable

from .. import eventfd


class Attendant:
    """Calls `serve` when something has come on the socket `fd` while it is told to look, or when the server has gone; ends when that
    returns False."""

    def __init__(self, serve: Callable[[], bool], fd: int) -> None:
        self._serve = serve
        self._stop = eventfd.make()
        self._epoll = select.epoll()
        self._epoll.register(self._stop, select.EPOLLIN)
        self._epoll.register(fd, 0)
        self._thread = threading.Thread(target=self._main, name="vfio-user-client", daemon=True)
        self._thread.start()

    def look(self, fd: int) -> None:
        self._epoll.modify(fd, select.EPOLLIN)

    def look_away(self, fd: int) -> None:
        self._epoll.modify(fd, 0)

    def stop(self) -> None:
        """End the thread. Its connection is told to be closed already, and nobody holds its lock."""
        eventfd.ring(self._stop)
        if self._thread is not threading.current_thread():
            self._thread.join()
        self._epoll.close()
        os.close(self._stop)

    def _main(self) -> None:
        while True:
            ready = [fd for fd, _ in self._epoll.poll()]
            if self._stop in ready or not self._serve():
                return
