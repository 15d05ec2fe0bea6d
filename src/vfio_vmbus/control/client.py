"""The asking side: all processes at once, each with its own patience. What answers may be anybody's, and hostile."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Final

import msgspec

from ..bus.machine import Machine
from ..errors import PeerError, ProtocolError, RefusedError, UsageError
from ..vfio.user.listener import Peer
from .messages import LONGEST_ANSWER, Answer, Command, Report, Request, Status, line_of, parse_answer
from .places import Place, places, remove_stale

_REPORT_SECONDS: Final = 5.0
_COMMAND_SECONDS: Final = 30.0
"""Longer than a host's control plane may take."""


@dataclass(frozen=True)
class Found:
    """A process and what it said of itself, or why it did not. pid: as the kernel says, 0 if it could not be asked."""

    name: str
    pid: int
    report: Report | None = None
    problem: str | None = None


class _Stale(Exception):
    """A socket that a process has left behind."""


def processes(machine: Machine = Machine()) -> list[Found]:  # noqa: B008  (frozen)
    """All processes with a control socket that this user may see, by age; what is left of dead ones is removed where possible."""
    found = asyncio.run(_ask_all(places(machine)))
    return sorted(found, key=lambda one: (one.report.since if one.report else float("inf"), one.name))


def process(name: str, machine: Machine = Machine()) -> Found:  # noqa: B008  (frozen)
    """The one of this name or number (pid). Raises UsageError where there is none, or more than one: two users' may be called alike."""
    return _chosen(name, machine)[1]


def order(name: str, command: Command, machine: Machine = Machine()) -> str:  # noqa: B008  (frozen)
    """Have the process carry out a command: what became of it.

    Raises UsageError as `process` and for commands that make no sense there, RefusedError where it could not be done, PeerError for
    one that does not answer.
    """
    place, found = _chosen(name, machine)
    try:
        answer, _ = asyncio.run(_ask(place, command, _COMMAND_SECONDS))
    except _Stale:
        raise UsageError(f"{found.name} has just ended") from None
    if answer.refused is not None:
        raise UsageError(answer.refused) if answer.wrong_use else RefusedError(answer.refused)
    if answer.done is None:
        raise ProtocolError(f"{found.name} did not say what became of it")
    return answer.done


def _chosen(name: str, machine: Machine) -> tuple[Place, Found]:
    """The places of this name are asked alone, so that nobody else's slowness counts; all of them only where a pid is meant."""
    named = [place for place in places(machine) if place.name == name]
    candidates = named or (places(machine) if name.isdecimal() else [])
    asked = zip(candidates, asyncio.run(_ask_each(candidates)), strict=True)
    fitting = [(place, one) for place, one in asked if one is not None and (named or str(one.pid) == name)]
    if len(fitting) > 1:
        raise UsageError(
            f"{name}: {len(fitting)} processes are called so: take the pid ({', '.join(str(one.pid) for _, one in fitting)})"
        )
    if not fitting:
        raise UsageError(f"no process is called {name} (see vfio-vmbus status)")
    return fitting[0]


async def _ask_all(sockets: Sequence[Place]) -> list[Found]:
    return [found for found in await _ask_each(sockets) if found is not None]


async def _ask_each(sockets: Sequence[Place]) -> list[Found | None]:
    return await asyncio.gather(*(_report(place) for place in sockets))


async def _report(place: Place) -> Found | None:
    try:
        answer, pid = await _ask(place, Status(), _REPORT_SECONDS)
    except _Stale:
        remove_stale(place)
        return None
    except PeerError as error:
        return Found(place.name, 0, problem=str(error))
    if answer.report is None:
        return Found(place.name, pid, problem=answer.refused or "it did not say anything about itself")
    report = msgspec.structs.replace(answer.report, name=place.name, pid=pid)  # nobody is believed who he is
    return Found(place.name, pid, report)


async def _ask(place: Place, request: Request, seconds: float) -> tuple[Answer, int]:
    """Its answer, and its pid as of SO_PEERCRED. Raises _Stale, PeerError."""
    try:
        async with asyncio.timeout(seconds):
            return await _exchange(place, request)
    except TimeoutError:
        raise PeerError(f"{place.name} does not answer within {seconds:g} s") from None
    except ConnectionRefusedError:
        raise _Stale from None
    except FileNotFoundError:
        raise _Stale from None
    except OSError as error:
        raise PeerError(f"{place.name} cannot be asked: {error.strerror or error}") from None


async def _exchange(place: Place, request: Request) -> tuple[Answer, int]:
    reader, writer = await asyncio.open_unix_connection(place.path, limit=LONGEST_ANSWER)
    try:
        peer = Peer.of(writer.get_extra_info("socket"))
        if peer.uid not in (place.uid, 0):
            raise PeerError(f"{place.name} is in user {place.uid}'s folder, but user {peer.uid}'s")
        writer.write(line_of(request))
        await writer.drain()
        try:
            line = await reader.readuntil(b"\n")
        except asyncio.LimitOverrunError:
            raise ProtocolError(f"{place.name} answers with more than {LONGEST_ANSWER} bytes") from None
        except asyncio.IncompleteReadError:
            raise PeerError(f"{place.name} has ended, or turns this user away") from None
        return parse_answer(line), peer.pid
    finally:
        writer.transport.abort()
        with suppress(OSError):
            await writer.wait_closed()
