"""The demonstration's host process: the embedded host with its switch, and the judge of the attacks on it.

Standard input is the socket to the driver's process; when that ends, so does this.
"""

from __future__ import annotations

import os
import signal
import socket
import sys
from contextlib import ExitStack

from ..apps.lab.namespace import exit_with
from ..errors import LocalError, UsageError, VfioVmbusError
from ..host.embedded import EmbeddedHost
from ..host.netvsp.vsp import Netvsp
from ..host.serving import HostServer
from ..host.switch.port import Port
from ..testing.attacker import Outcome
from ..testing.judge import Judge
from . import messages


class _Host:
    """What the driver's process asked for so far."""

    def __init__(self, stack: ExitStack, request: messages.SetUp, tap: int | None) -> None:
        self.host = stack.enter_context(EmbeddedHost())
        if tap is not None:
            self.host.switch.add_tap(tap, "left")
        self.card: Netvsp = self.host.add_nic("nic0", request.mac or None)
        self.judge = Judge(self.host)
        stack.callback(self.judge.close)
        self.server = stack.enter_context(HostServer(self.host))
        self._replay: Port | None = None

    def perform(self, request: messages.Request, fd: int | None) -> messages.Reply:
        """Raises VfioVmbusError."""
        match request:
            case messages.Attach(attacker=attacker):
                self.server.adopt(_need(fd), self.judge.card if attacker else self.card)
            case messages.Watch():
                self.judge.watch()
            case messages.AskGone():
                return messages.Gone(self.judge.gone())
            case messages.AskFinding(refused=refused, failed=failed, unanswered=unanswered, lawful=lawful):
                outcome = Outcome(0, failed=failed, unanswered=unanswered, refused=refused)
                finding = self.judge.finding(outcome, lawful=lawful)
                return messages.Found(finding.bytes_touched, finding.evidence)
            case messages.Replay(path=path, pace=pace):
                self._replay = self.host.switch.add_replay(path, pace=pace)
            case messages.StopReplay():
                if self._replay is not None:
                    self.host.switch.remove(self._replay)
            case messages.SetUp():
                raise UsageError("the host runs already")
        return messages.Done()


def _need(fd: int | None) -> int:
    if fd is None:
        raise UsageError("a socket has to come along")
    return fd


def _answer(host: _Host, data: bytes, fd: int | None) -> messages.Reply:
    try:
        return host.perform(messages.decode_request(data), fd)
    except VfioVmbusError as error:
        return messages.Failure.of(error)
    except OSError as error:
        return messages.Failure.of(LocalError(str(error)))


def _receive(control: socket.socket) -> tuple[bytes, int | None]:
    data, fds, _, _ = socket.recv_fds(control, messages.PACKET_LIMIT, 1, socket.MSG_CMSG_CLOEXEC)
    return data, fds[0] if fds else None


def main(parent: int) -> None:
    """Serve the process `parent`, which started this one, until it is gone or closes its socket."""
    exit_with(parent)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which then closes the socket
    control = socket.socket(fileno=os.dup(0))
    with ExitStack() as stack:
        data, tap = _receive(control)
        if not data:
            return
        first = messages.decode_request(data)
        if not isinstance(first, messages.SetUp):
            raise UsageError("SetUp comes first")
        host = _Host(stack, first, tap)
        control.send(messages.encode(messages.Ready(host.judge.card.mac, host.judge.addresses)))
        while True:
            data, fd = _receive(control)
            if not data:
                return
            control.send(messages.encode(_answer(host, data, fd)))


if __name__ == "__main__":
    main(int(sys.argv[1]))
