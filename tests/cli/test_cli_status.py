"""`vfio-vmbus status` and `control` with processes as they are: a server, a driver that is its client, and one that is unsafe."""

from __future__ import annotations

import fcntl
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.cli.commands import Process, one_line, run, started
from tests.cli.test_cli_serve import line, rest
from tests.control.test_exposition import read
from vfio_vmbus.bus.machine import Machine


def can_be_seen() -> bool:
    folder = Machine().state_folder()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        return False
    return os.access(folder, os.W_OK)


pytestmark = pytest.mark.skipif(not can_be_seen(), reason=f"{Machine().state_folder()} cannot be written here")


def asked(*arguments: str) -> dict[str, Any]:
    done = run("status", *arguments, "--json")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def until(condition: Callable[[dict[str, Any]], bool], name: str) -> dict[str, Any]:
    """The process's report, as soon as it is so; each look takes a while by itself."""
    for _ in range(100):
        done = run("status", name, "--json")
        if done.returncode == 0 and "problem" not in (found := json.loads(done.stdout)["processes"][0]) and condition(found):
            return found
    raise AssertionError(f"never: {done.stdout}{done.stderr}")


def test_a_server_and_its_client(tmp_path: Path) -> None:
    name = f"cards-{os.getpid()}"
    with started("serve", "--listen", tmp_path / "a", "--port", "generator", "--name", name) as server:
        assert line(server).startswith("serving")
        found = asked(name)["processes"][0]
        assert (found["kind"], found["pid"], found["clients"], found["unsafe"]) == ("serve", server.pid, [], [])
        with started("net", "fwd", "--device", f"unix:{tmp_path}/a") as driver:
            busy = until(lambda one: one["clients"] and one["devices"][0]["counters"]["sent_frames"] > 0, name)
            (client,) = busy["clients"]
            assert client["name"] == f"{tmp_path}/a, process {driver.pid}"
            assert (client["devices"], client["version"], client["channels"], client["gpadls"]) == (["nic0"], "5.3", 1, 3)
            assert {port["name"]: port["kind"] for port in busy["ports"]} == {"generator0": "generator", "nic0": "nic"}
            assert busy["ports"][0]["per_second"]["rx_frames"] > 0
            driven = until(lambda one: one["devices"][0]["counters"]["tx_frames"] > 0, str(driver.pid))
            assert (driven["name"], driven["devices"][0]["isolation"]) == (f"fwd-{driver.pid}", "isolated")
            everybody = run("status").stdout
            assert f"{name}: vfio-vmbus serve" in everybody
            assert f"fwd-{driver.pid}: vfio-vmbus fwd" in everybody
            assert "nic0: isolated: software IOMMU" in everybody
            _, samples = read(run("status", name, "--metrics").stdout)
            assert samples["vfio_vmbus_device_sent_frames_total", (("process", name), ("device", "nic0"))] > 0
            assert samples["vfio_vmbus_client_channels", (("process", name), ("client", client["name"]))] == 1
        server.terminate()
        assert rest(server)[1].count("\n") <= 1  # that it compiles
    assert name not in run("status").stdout


def test_orders_to_a_server(tmp_path: Path) -> None:
    name = f"cards-{os.getpid()}"
    with started("serve", "--listen", tmp_path / "a", "--name", name) as server:
        line(server)
        with started("net", "fwd", "--device", f"unix:{tmp_path}/a") as driver:
            until(lambda one: one["clients"] and one["clients"][0]["channels"], name)
            assert run("control", name, "link", "nic0", "down").stdout == "nic0: link down\n"
            assert asked(name)["processes"][0]["devices"][0]["link"] is False
            assert run("control", str(server.pid), "link", "nic0", "up").stdout == "nic0: link up\n"
            done = run("control", name, "offer", "nic1")
            assert done.stdout.startswith("nic1: offered to ")
            assert run("control", name, "rescind", "nic1").stdout.startswith("nic1: taken away from ")
            done = run("control", name, "mtu", "nic0", "1500")
            assert (done.returncode, done.stderr) == (0, "")
            assert done.stdout.startswith("nic0: MTU 1500; taken away from ")
            report = asked(name)["processes"][0]
            assert {device["name"]: device["mtu"] for device in report["devices"]} == {"nic0": 1500, "nic1": 9000}
            assert_taken_away(driver)
        with started("net", "fwd", "--device", f"unix:{tmp_path}/a") as driver:
            until(lambda one: one["clients"] and one["clients"][0]["channels"], name)
            assert run("control", name, "rescind", "nic0").stdout.startswith("nic0: taken away from ")
            assert_taken_away(driver)
        for arguments, says in {
            ("link", "nic9", "up"): "no device nic9: there are nic0",
            ("link", "nic0", "sideways"): "take up or down",
            ("mtu", "nic0", "9001"): "take 68 to 9000 bytes",
            ("rescind", "nic0"): "no client has it",
        }.items():
            refused = run("control", name, *arguments)
            assert refused.returncode == 2
            assert says in one_line(refused)


def assert_taken_away(driver: Process) -> None:
    """It ends, and says why."""
    _, said = rest(driver)
    assert driver.returncode == 1
    assert said.splitlines()[-1].endswith("was taken away by its host")


def test_a_driver_on_a_host_of_its_own_takes_orders() -> None:
    with started("net", "fwd", "--port", "generator") as driver:
        until(lambda one: bool(one["ports"]), f"fwd-{driver.pid}")
        done = run("control", f"fwd-{driver.pid}", "link", "nic0", "down")
        assert (done.stdout, done.stderr) == ("nic0: link down\n", "")


def test_a_name_is_taken_once(tmp_path: Path) -> None:
    name = f"cards-{os.getpid()}"
    with started("serve", "--listen", tmp_path / "a", "--name", name) as server:
        line(server)
        done = run("serve", "--listen", tmp_path / "b", "--name", name)
        assert done.returncode == 2
        assert f"another process is called {name}" in done.stderr
        assert not (tmp_path / "b").exists()
        server.kill()
        server.wait(60)
    assert name not in run("status").stdout  # whose socket it left behind
    with started("serve", "--listen", tmp_path / "b", "--name", name) as server:
        assert line(server).startswith("serving")


def test_what_is_unsafe_is_loud(tmp_path: Path) -> None:
    folder = Machine().state_folder()
    folder.mkdir(parents=True, exist_ok=True)
    with subprocess.Popen(["sleep", "100"]) as other:  # its mark is held here, as a process of ours holds its own
        path = folder / f"unsafe-{other.pid}.json"
        use = {"pid": other.pid, "what": "uio_hv_generic of eth1\x1b[2J", "since": 1.5, "logged": True, "tainted": True}
        path.write_text(json.dumps(use) + "\n")
        try:
            with path.open() as mark:
                fcntl.flock(mark, fcntl.LOCK_EX)
                said = run("status").stdout
                assert f"process {other.pid} is allowed uio_hv_generic of eth1?[2J: nothing keeps it within" in said
                assert "UNSAFE: since 1970-01-01" in said
                assert other.pid in [one["pid"] for one in asked()["unsafe_uses"]]
                _, samples = read(run("status", "--metrics").stdout)
                assert samples["vfio_vmbus_unsafe_uses", ()] >= 1
        finally:
            path.unlink(missing_ok=True)
            other.kill()


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["status", "nobody-of-this-name"], "no process is called nobody-of-this-name"),
        (["status", "../x"], "no process is called ../x"),
        (["status", "--json", "--metrics"], "take --json or --metrics"),
        (["control", "nobody-of-this-name", "rescind", "nic0"], "no process is called nobody-of-this-name"),
        (["control", "a", "explode"], "No such command"),
        (["serve", "--listen", "/tmp/x", "--name", "a/b"], "'a/b' is no name for a process"),
    ],
)
def test_wrong_use_is_one_line_and_status_2(arguments: list[str], says: str) -> None:
    done = run(*arguments)
    assert done.returncode == 2
    assert says in done.stderr.splitlines()[-1]


@pytest.mark.parametrize("command", ["status", "control a link", "control a rescind", "control a offer", "control a mtu"])
def test_help_gives_an_example(command: str) -> None:
    done = run(*command.split(), "--help")
    assert done.returncode == 0
    assert "Example: vfio-vmbus " in done.stdout


def test_where_it_cannot_be_seen_a_command_says_so_and_goes_on(tmp_path: Path) -> None:
    program = (
        "import ctypes, os, sys\n"
        "libc = ctypes.CDLL(None, use_errno=True)\n"
        "if libc.unshare(0x20000) or libc.mount(b'none', b'/', None, 0x44000, None): sys.exit(77)\n"
        "if libc.mount(b'tmpfs', b'/run', b'tmpfs', 1, None): sys.exit(77)\n"  # read-only
        "sys.argv = ['vfio-vmbus', 'net', 'fwd', '--port', 'generator', '--seconds', '0.1', '--json']\n"
        "from vfio_vmbus.cli.main import main\n"
        "main()\n"
    )
    if os.geteuid() != 0:
        pytest.skip("hiding /run from a process takes a mount namespace of root's")
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    if done.returncode == 77:
        pytest.skip("mount namespaces are forbidden here")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["sent"] > 0
    assert "status and control will not find this process: /run/vfio-vmbus/control/fwd-" in done.stderr
