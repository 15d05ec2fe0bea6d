"""Why the kernel refuses a TAP or a namespace, as one line that says what to do."""

import errno
import os
from collections.abc import Mapping
from pathlib import Path
from stat import filemode

TUN_PATH = "/dev/net/tun"
SYSCTLS = (
    "user.max_user_namespaces",
    "user.max_net_namespaces",
    "kernel.unprivileged_userns_clone",  # Debian's and Arch's own
    "kernel.apparmor_restrict_unprivileged_userns",  # Ubuntu 23.10 and later
)


def read_sysctls() -> dict[str, int]:
    """Those of `SYSCTLS` that this kernel has; user.* are the limits of the caller's user namespace."""
    found: dict[str, int] = {}
    for name in SYSCTLS:
        try:
            found[name] = int(Path("/proc/sys", *name.split(".")).read_text())
        except (OSError, ValueError):
            continue
    return found


def tun_refused(error: OSError) -> str:
    """Says why /dev/net/tun could not be opened."""
    if error.errno == errno.ENOENT:
        return f"{TUN_PATH} does not exist; as root: modprobe tun (for a container: --device {TUN_PATH})"
    if error.errno in (errno.ENODEV, errno.ENXIO):
        return f"{TUN_PATH} has no driver behind it; as root: modprobe tun"
    if error.errno in (errno.EACCES, errno.EPERM):
        return (
            f"{TUN_PATH} may not be opened by uid {os.geteuid()} ({_mode(TUN_PATH)}); "
            f"as root: chmod 0666 {TUN_PATH} (for a container: --device {TUN_PATH})"
        )
    return f"{TUN_PATH} cannot be opened: {error.strerror}"


def _mode(path: str) -> str:
    try:
        found = os.stat(path)
    except OSError as error:
        return f"its mode is not visible: {error.strerror}"
    return f"mode {filemode(found.st_mode)}, owner uid {found.st_uid}"


def namespace_refused(what: str, number: int, sysctls: Mapping[str, int]) -> str:
    """Says why a step towards namespaces of one's own failed.

    what: the step, "user namespace", "network namespace" or another that needs the privileges they give.
    number: the errno.
    sysctls: as `read_sysctls` gives them.
    """
    kind = "net" if what == "network namespace" else "user"
    if number in (errno.ENOSPC, errno.EUSERS):
        name = f"user.max_{kind}_namespaces"
        here = f" ({sysctls[name]} here)" if name in sysctls else ""
        return f"the {what} is refused: the limit {name}{here} is reached; as root: sysctl {name}=10000"
    if number in (errno.EPERM, errno.EACCES):
        return f"the {what} is refused: {_forbidden_by(sysctls)}"
    if number == errno.EINVAL:
        return f"the {what} is refused: this kernel has none (CONFIG_{kind.upper()}_NS)"
    return f"the {what} is refused: {os.strerror(number)}"


def _forbidden_by(sysctls: Mapping[str, int]) -> str:
    if sysctls.get("kernel.unprivileged_userns_clone") == 0:
        return "kernel.unprivileged_userns_clone is 0; as root: sysctl kernel.unprivileged_userns_clone=1, or run this as root"
    if sysctls.get("kernel.apparmor_restrict_unprivileged_userns", 0) != 0:
        return (
            "AppArmor restricts unprivileged user namespaces; "
            "as root: sysctl kernel.apparmor_restrict_unprivileged_userns=0, or run this as root"
        )
    return (
        "not permitted, as in a chroot or in a container whose seccomp or LSM rules forbid it; "
        "run this outside, or the container with --security-opt seccomp=unconfined"
    )
