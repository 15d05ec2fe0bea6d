"""Runs in the guest: takes payloads over a virtio-serial port, runs each in a process of its own, and sends back what it says.

A payload is a function in a Python file, called as `function(report, **arguments)`; `report(value)` sends a value to the
test while it runs, what it returns is its result; both become JSON. Its prints go to the console. Lines on the port are JSON objects:
in {"id", "file", "function", "arguments", "timeout"} or {"id", "stop"}, out {"id", "report" | "result" | "error"}; id 0 is the agent's.
"""

from __future__ import annotations

import importlib.util
import json
import os
import selectors
import shutil
import signal
import sys
import time
import traceback
from pathlib import Path
from typing import Any

_PIECE = 1 << 16


class Child:
    """One payload's process."""

    def __init__(self, order: dict[str, Any]) -> None:
        self.number = order["id"]
        self.deadline = time.monotonic() + order["timeout"]
        self.unfinished = b""
        self.ended = False  # it has said how it went
        self.pipe, theirs = os.pipe()
        sys.stdout.flush()
        self.pid = os.fork()
        if self.pid == 0:
            os.close(self.pipe)
            _run(order, theirs)
        os.close(theirs)


def _run(order: dict[str, Any], pipe: int) -> None:
    """The child's life."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("stopped"))

    def say(**words: Any) -> None:
        data = json.dumps({"id": order["id"], **words}, default=bytes.hex).encode() + b"\n"
        while data:
            data = data[os.write(pipe, data) :]

    code = 1
    try:
        os.setsid()
        spec = importlib.util.spec_from_file_location("payload", order["file"])
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        function = getattr(module, order["function"])
        before = _kernels()
        result = function(lambda value: say(report=value), **order["arguments"])
        if compiled := _kernels() - before:
            print(f"agent: compiled in the guest: {sorted(compiled)}", flush=True)
        say(result=result, compiled=len(compiled))
        code = 0
    except BaseException:  # the process is the payload's: whatever ends it is told to the test
        say(error=traceback.format_exc())
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _kernels() -> set[str]:
    """The compiled kernels in the cache."""
    return {path.name for path in Path(os.environ["XDG_CACHE_HOME"]).rglob("*.nbc")}


class Agent:
    def __init__(self, port: int) -> None:
        self._port = port
        self._unfinished = b""
        self._children: dict[int, Child] = {}
        self._selector = selectors.DefaultSelector()
        self._selector.register(port, selectors.EVENT_READ)

    def serve(self, compiled: int) -> None:
        """Until the other side of the port is gone."""
        hello = f"Linux {os.uname().release}, Python {sys.version.split()[0]}, up {time.monotonic():.1f} s"
        self._say({"id": 0, "report": hello, "compiled": compiled})
        while True:
            for key, _ in self._selector.select(0.5):
                if key.fileobj == self._port:
                    data = os.read(self._port, _PIECE)
                    if not data:
                        return
                    self._unfinished += data
                    *lines, self._unfinished = self._unfinished.split(b"\n")
                    for line in lines:
                        self._obey(json.loads(line))
                else:
                    self._hear(key.data)
            for child in list(self._children.values()):
                if time.monotonic() > child.deadline:
                    self._fail(child, "the payload took longer than its time-out and was killed")
                    os.kill(child.pid, signal.SIGKILL)

    def _obey(self, order: dict[str, Any]) -> None:
        if "stop" in order:
            if child := self._children.get(order["id"]):
                os.kill(child.pid, signal.SIGTERM)
            return
        child = Child(order)
        self._children[child.number] = child
        self._selector.register(child.pipe, selectors.EVENT_READ, child)

    def _hear(self, child: Child) -> None:
        data = os.read(child.pipe, _PIECE)
        child.unfinished += data
        *lines, child.unfinished = child.unfinished.split(b"\n")
        for line in lines:
            message = json.loads(line)
            child.ended = child.ended or "report" not in message
            self._say(message)
        if not data:
            self._selector.unregister(child.pipe)
            os.close(child.pipe)
            _, status = os.waitpid(child.pid, 0)
            del self._children[child.number]
            self._fail(child, f"the payload's process ended with {os.waitstatus_to_exitcode(status)}")

    def _fail(self, child: Child, why: str) -> None:
        if not child.ended:
            child.ended = True
            self._say({"id": child.number, "error": why})

    def _say(self, message: dict[str, Any]) -> None:
        data = json.dumps(message).encode() + b"\n"
        while data:
            data = data[os.write(self._port, data) :]


def main(kernels: str, *preload: str) -> None:
    """kernels: the folder of kernels compiled for this guest; it is copied, as a cache has to be writable. preload: modules
    that most payloads import, which are imported once."""
    shutil.copytree(kernels, os.environ["XDG_CACHE_HOME"])
    before = _kernels()
    print(f"agent: up {time.monotonic():.1f} s", flush=True)
    for name in preload:
        importlib.import_module(name)
    compiled = len(_kernels() - before)
    print(f"agent: {len(before)} kernels came along, {compiled} were compiled at the start", flush=True)
    port = next(Path("/sys/class/virtio-ports").glob("vport*")).name
    Agent(os.open(f"/dev/{port}", os.O_RDWR | os.O_CLOEXEC)).serve(compiled)


if __name__ == "__main__":
    main(*sys.argv[1:])
