"""What a well-formed request can still ask too much of. Each check returns what is wrong, or nothing: the request is then refused."""

from collections.abc import Collection

from vfio_vmbus.vmbus.gpadl import Assembly
from vfio_vmbus.vmbus.host_records import HostChannel, HostGpadl
from vfio_vmbus.vmbus.limits import HostLimits
from vfio_vmbus.vmbus.states import GpadlView
from vfio_vmbus.wire.vmbus import STATUS_SUCCESS, VP_INDEX_DISABLE_INTERRUPT, OpenChannel

MIN_RING_PAGES = 2  # a control page and one page of data


def ring_problem(channel: HostChannel, message: OpenChannel) -> str:
    """Both rings must lie in whole pages of a ready GPADL of this channel."""
    gpadl = channel.gpadls.get(message.ring_gpadl)
    if gpadl is None or channel.gpadl_view(gpadl) is not GpadlView.READY:
        return f"GPADL {message.ring_gpadl:#x} is not a ready one of this channel"
    if not MIN_RING_PAGES <= message.downstream_page_offset <= gpadl.ring_pages - MIN_RING_PAGES:
        return (
            f"downstream ring at page {message.downstream_page_offset} of {gpadl.ring_pages} whole pages; "
            f"each ring needs {MIN_RING_PAGES}"
        )
    return ""


def vp_problem(target_vp: int, limits: HostLimits, *, may_disable: bool) -> str:
    """An open may ask for no interrupts at all, a modify may not."""
    if target_vp < limits.target_vps or (may_disable and target_vp == VP_INDEX_DISABLE_INTERRUPT):
        return ""
    return f"target_vp {target_vp:#x}, limit {limits.target_vps - 1:#x}"


def room_problem(pages: int, gpadls: Collection[HostGpadl], unfinished: Collection[Assembly], limits: HostLimits) -> str:
    """One more GPADL of so many pages, beside those that are there or promised. Refused ones take no room."""
    promised = [item for item in unfinished if item.status == STATUS_SUCCESS]
    count = len(gpadls) + len(promised) + 1
    total = sum(item.pages for item in gpadls) + sum(item.pages for item in promised) + pages
    if count > limits.max_gpadls:
        return f"{count} GPADLs, limit {limits.max_gpadls}"
    if pages > limits.max_gpadl_pages:
        return f"{pages} pages, limit {limits.max_gpadl_pages}"
    if total > limits.max_total_pages:
        return f"{total} pages in all GPADLs, limit {limits.max_total_pages}"
    return ""
