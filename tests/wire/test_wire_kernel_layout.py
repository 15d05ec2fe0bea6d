"""Our declarations against the kernel's own type data: tests/fixtures/btf, made by tools/btf_extract.py.

Encoder and decoder come from one table, so that they agree even about a wrong offset; the kernel does not.
"""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.wire.strategies import all_structs
from vfio_vmbus.wire import dm, frame, gpa, guids, hyperv, monitor, ndis, nvsp, oid, ring, rndis, vmbus
from vfio_vmbus.wire.bits import BitField
from vfio_vmbus.wire.layout import Codec, Nested, Struct, Tail

KERNEL = json.loads((Path(__file__).parent.parent / "fixtures/btf/linux-6.12-cloud-amd64.json").read_text())
STRUCTS = KERNEL["structs"]
ENUMERATORS = KERNEL["enumerators"]
CONSTANTS = KERNEL["constants"]

# Our class -> the kernel's structure, and within it the member that is ours ("" for all of it), and our fields
# in order, each with the path of the kernel's member. "-" stands for a hole that the C compiler leaves, or for
# what the kernel does not split up as we do; such a field is held in place by the ones around it and the size.
VMBUS_HEADER = "message_type=header.msgtype padding=header.padding "
RELID = VMBUS_HEADER + "child_relid=child_relid "
NVSP = "message_type=hdr.msg_type "
DM = "message_type=hdr.type size=hdr.size transaction_id=hdr.trans_id "
RNDIS = "message_type=ndis_msg_type message_length=msg_len "
OBJECT = "header=header header.object_type=header.type header.revision=header.revision header.size=header.size "
RSS_OBJECT = "header=hdr header.object_type=hdr.type header.revision=hdr.rev header.size=hdr.size "
DESCRIPTOR = "packet_type=type offset8=offset8 length8=len8 flags=flags transaction_id=trans_id"
OFFER = (
    "class_guid=if_type instance_guid=if_instance interrupt_latency=reserved1 interface_revision=- server_context_size=- "
    "flags=chn_flags mmio_megabytes=mmio_megabytes user_defined=u.std.user_def sub_channel_index=sub_channel_index "
    "mmio_megabytes_optional=reserved3"
)
CHECKSUM = (
    "ipv4_tx_encapsulation=ip4_txenc ipv4_tx=ip4_txcsum ipv4_rx_encapsulation=ip4_rxenc ipv4_rx=ip4_rxcsum "
    "ipv6_tx_encapsulation=ip6_txenc ipv6_tx=ip6_txcsum ipv6_rx_encapsulation=ip6_rxenc ipv6_rx=ip6_rxcsum"
)
LARGE_SEND = (
    "ipv4_encapsulation=ip4_encap ipv4_max_size=ip4_maxsz ipv4_min_segments=ip4_minsg "
    "ipv6_encapsulation=ip6_encap ipv6_max_size=ip6_maxsz ipv6_min_segments=ip6_minsg ipv6_options=ip6_opts"
)


def inside(prefix: str, fields: str) -> str:
    """The fields of a nested structure of ours, called `ours` here and `theirs` there ("ours=theirs")."""
    ours, _, theirs = prefix.partition("=")
    rows = (field.split("=") for field in fields.split())
    nested = (f"{ours}.{name}={path if path == '-' else f'{theirs}.{path}'}" for name, path in rows)
    return f"{prefix} {' '.join(nested)} "


LAYOUTS: list[tuple[type[Struct], str, str, str]] = [
    (
        hyperv.SlotHeader,
        "hv_message_header",
        "",
        "message_type=message_type payload_size=payload_size flags=message_flags reserved=reserved sender=sender",
    ),
    (
        hyperv.PostMessage,
        "hv_input_post_message",
        "",
        "connection_id=connectionid reserved=reserved message_type=message_type payload_size=payload_size payload=payload",
    ),
    (vmbus.Message, "vmbus_channel_message_header", "", "message_type=msgtype padding=padding"),
    (
        vmbus.InitiateContact,
        "vmbus_channel_initiate_contact",
        "",
        VMBUS_HEADER + "version_requested=vmbus_version_requested target_vcpu=target_vcpu target_info=interrupt_page "
        "monitor_page1=monitor_page1 monitor_page2=monitor_page2",
    ),
    (
        vmbus.VersionResponse,
        "vmbus_channel_version_response",
        "",
        VMBUS_HEADER + "version_supported=version_supported connection_state=connection_state padding2=padding "
        "message_connection_id=msg_conn_id",
    ),
    (vmbus.ChannelOffer, "vmbus_channel_offer", "", OFFER),
    (
        vmbus.OfferChannel,
        "vmbus_channel_offer_channel",
        "",
        VMBUS_HEADER + inside("offer=offer", OFFER) + "child_relid=child_relid monitor_id=monitorid monitor=- "
        "interrupt=- connection_id=connection_id",
    ),
    (vmbus.RescindChannelOffer, "vmbus_channel_rescind_offer", "", RELID),
    (vmbus.RelidReleased, "vmbus_channel_relid_released", "", RELID),
    (
        vmbus.OpenChannel,
        "vmbus_channel_open_channel",
        "",
        RELID + "open_id=openid ring_gpadl=ringbuffer_gpadlhandle target_vp=target_vp "
        "downstream_page_offset=downstream_ringbuffer_pageoffset user_data=userdata",
    ),
    (vmbus.OpenChannelResult, "vmbus_channel_open_result", "", RELID + "open_id=openid status=status"),
    (vmbus.CloseChannel, "vmbus_channel_close_channel", "", RELID),
    (
        vmbus.GpadlHeader,
        "vmbus_channel_gpadl_header",
        "",
        RELID + "gpadl=gpadl range_bytes=range_buflen range_count=rangecount words=range",
    ),
    (vmbus.GpadlBody, "vmbus_channel_gpadl_body", "", VMBUS_HEADER + "message_number=msgnumber gpadl=gpadl words=pfn"),
    (vmbus.GpadlCreated, "vmbus_channel_gpadl_created", "", RELID + "gpadl=gpadl status=creation_status"),
    (vmbus.GpadlTeardown, "vmbus_channel_gpadl_teardown", "", RELID + "gpadl=gpadl"),
    (vmbus.GpadlTorndown, "vmbus_channel_gpadl_torndown", "", VMBUS_HEADER + "gpadl=gpadl"),
    (
        vmbus.TlConnectRequest,
        "vmbus_channel_tl_connect_request",
        "",
        VMBUS_HEADER + "guest_endpoint=guest_endpoint_id host_service=host_service_id",
    ),
    (vmbus.ModifyChannel, "vmbus_channel_modifychannel", "", RELID + "target_vp=target_vp"),
    (vmbus.ModifyChannelResponse, "vmbus_channel_modifychannel_response", "", RELID + "status=status"),
    (gpa.GpaRange, "gpa_range", "", "byte_count=byte_count byte_offset=byte_offset"),
    (
        ring.RingControl,
        "hv_ring_buffer",
        "",
        "write_index=write_index read_index=read_index interrupt_mask=interrupt_mask pending_send_size=pending_send_sz "
        "reserved1=reserved1 features=feature_bits.value reserved2=reserved2",
    ),
    (ring.PacketHeader, "vmpacket_descriptor", "", DESCRIPTOR),
    (ring.PageBuffer, "hv_page_buffer", "", "byte_count=len byte_offset=offset pfn=pfn"),
    (ring.TransferRange, "vmtransfer_page_range", "", "byte_count=byte_count byte_offset=byte_offset"),
    (
        ring.TransferPagesHeader,
        "vmtransfer_page_packet_header",
        "",
        inside("header=d", DESCRIPTOR) + "pageset_id=xfer_pageset_id sender_owns_set=sender_owns_set reserved=reserved "
        "range_count=range_cnt ranges=ranges",
    ),
    (
        ring.GpaDirectHeader,
        "vmbus_packet_mpb_array",  # its fixed part; vmdata_gpa_direct, which nothing uses, is in no BTF
        "-24",
        "header=- header.packet_type=type header.offset8=dataoffset8 header.length8=length8 header.flags=flags "
        "header.transaction_id=transactionid reserved=reserved range_count=rangecount",
    ),
    (nvsp.NvspMessage, "nvsp_message", "hdr", NVSP),
    (nvsp.Init, "nvsp_message", "msg.init_msg.init", NVSP + "min_version=.min_protocol_ver max_version=.max_protocol_ver"),
    (
        nvsp.InitComplete,
        "nvsp_message",
        "msg.init_msg.init_complete",
        NVSP + "negotiated_version=.negotiated_protocol_ver max_mdl_chain_length=.max_mdl_chain_len status=.status",
    ),
    (
        nvsp.SendNdisVersion,
        "nvsp_message",
        "msg.v1_msg.send_ndis_ver",
        NVSP + "major=.ndis_major_ver minor=.ndis_minor_ver",
    ),
    (nvsp.SendReceiveBuffer, "nvsp_message", "msg.v1_msg.send_recv_buf", NVSP + "gpadl=.gpadl_handle buffer_id=.id"),
    (
        nvsp.ReceiveSection,
        "nvsp_1_receive_buffer_section",
        "",
        "offset=offset sub_allocation_size=sub_alloc_size sub_allocation_count=num_sub_allocs end_offset=end_offset",
    ),
    (
        nvsp.SendReceiveBufferComplete,
        "nvsp_message",
        "msg.v1_msg.send_recv_buf_complete",  # the kernel counts one section into its size
        NVSP + "status=.status section_count=.num_sections sections=.sections",
    ),
    (nvsp.RevokeReceiveBuffer, "nvsp_message", "msg.v1_msg.revoke_recv_buf", NVSP + "buffer_id=.id"),
    (nvsp.SendSendBuffer, "nvsp_message", "msg.v1_msg.send_send_buf", NVSP + "gpadl=.gpadl_handle buffer_id=.id"),
    (
        nvsp.SendSendBufferComplete,
        "nvsp_message",
        "msg.v1_msg.send_send_buf_complete",
        NVSP + "status=.status section_size=.section_size",
    ),
    (nvsp.RevokeSendBuffer, "nvsp_message", "msg.v1_msg.revoke_send_buf", NVSP + "buffer_id=.id"),
    (
        nvsp.SendRndisPacket,
        "nvsp_message",
        "msg.v1_msg.send_rndis_pkt",
        NVSP + "channel_type=.channel_type section_index=.send_buf_section_index section_size=.send_buf_section_size",
    ),
    (nvsp.SendRndisPacketComplete, "nvsp_message", "msg.v1_msg.send_rndis_pkt_complete", NVSP + "status=.status"),
    (
        nvsp.SendNdisConfig,
        "nvsp_message",
        "msg.v2_msg.send_ndis_config",
        NVSP + "mtu=.mtu reserved=.reserved capabilities=.capability",
    ),
    (nvsp.SendVfAssociation, "nvsp_message", "msg.v4_msg.vf_assoc", NVSP + "allocated=.allocated serial=.serial"),
    (nvsp.SwitchDataPath, "nvsp_message", "msg.v4_msg.active_dp", NVSP + "active=.active_datapath"),
    (nvsp.SubchannelRequest, "nvsp_message", "msg.v5_msg.subchn_req", NVSP + "operation=.op count=.num_subchannels"),
    (nvsp.SubchannelComplete, "nvsp_message", "msg.v5_msg.subchn_comp", NVSP + "status=.status count=.num_subchannels"),
    (nvsp.SendIndirectionTable, "nvsp_message", "msg.v5_msg.send_table", NVSP + "count=.count offset=.offset"),
    (nvsp.PdApiRequest, "nvsp_message", "msg.v6_msg.pd_req", NVSP + "operation=.op parameters=-"),
    (nvsp.PdApiComplete, "nvsp_message", "-12", NVSP + "operation=msg.v6_msg.pd_comp.op status=msg.v6_msg.pd_comp.status"),
    (
        nvsp.PdConfigResult,
        "nvsp_6_pd_api_comp",
        "@config",  # ours begins there
        "queue_count=.num_pd_q rss_queue_count=.num_rss_q supported=.is_supported enabled=.is_enabled",
    ),
    (rndis.RndisMessage, "rndis_message", "-8", RNDIS),
    (
        rndis.PacketMessage,
        "rndis_message",
        "msg.pkt",
        RNDIS + "data_offset=.data_offset data_length=.data_len oob_offset=.oob_data_offset oob_length=.oob_data_len "
        "oob_count=.num_oob_data_elements ppi_offset=.per_pkt_info_offset ppi_length=.per_pkt_info_len "
        "vc_handle=.vc_handle reserved=.reserved",
    ),
    (
        rndis.InitializeRequest,
        "rndis_message",
        "msg.init_req",
        RNDIS + "request_id=.req_id major_version=.major_ver minor_version=.minor_ver max_transfer_size=.max_xfer_size",
    ),
    (
        rndis.InitializeComplete,
        "rndis_message",
        "msg.init_complete",
        RNDIS + "request_id=.req_id status=.status major_version=.major_ver minor_version=.minor_ver "
        "device_flags=.dev_flags medium=.medium max_packets_per_message=.max_pkt_per_msg "
        "max_transfer_size=.max_xfer_size alignment_shift=.pkt_alignment_factor af_list_offset=.af_list_offset "
        "af_list_size=.af_list_size",
    ),
    (rndis.HaltRequest, "rndis_message", "msg.halt_req", RNDIS + "request_id=.req_id"),
    (
        rndis.QueryRequest,
        "rndis_message",
        "msg.query_req",
        RNDIS + "request_id=.req_id oid=.oid info_length=.info_buflen info_offset=.info_buf_offset vc_handle=.dev_vc_handle",
    ),
    (
        rndis.QueryComplete,
        "rndis_message",
        "msg.query_complete",
        RNDIS + "request_id=.req_id status=.status info_length=.info_buflen info_offset=.info_buf_offset",
    ),
    (
        rndis.SetRequest,
        "rndis_message",
        "msg.set_req",
        RNDIS + "request_id=.req_id oid=.oid info_length=.info_buflen info_offset=.info_buf_offset vc_handle=.dev_vc_handle",
    ),
    (rndis.SetComplete, "rndis_message", "msg.set_complete", RNDIS + "request_id=.req_id status=.status"),
    (rndis.ResetRequest, "rndis_message", "msg.reset_req", RNDIS + "reserved=.reserved"),
    (
        rndis.ResetComplete,
        "rndis_message",
        "msg.reset_complete",
        RNDIS + "status=.status addressing_reset=.addressing_reset",
    ),
    (
        rndis.IndicateStatus,
        "rndis_message",
        "msg.indicate_status",
        RNDIS + "status=.status info_length=.status_buflen info_offset=.status_buf_offset",
    ),
    (rndis.KeepaliveRequest, "rndis_message", "msg.keep_alive_req", RNDIS + "request_id=.req_id"),
    (
        rndis.KeepaliveComplete,
        "rndis_message",
        "msg.keep_alive_complete",
        RNDIS + "request_id=.req_id status=.status",
    ),
    (frame.PpiHeader, "rndis_per_packet_info", "", "size=size kind=- offset=ppi_offset"),
    (frame.PacketId, "rndis_pktinfo_id", "", "version=ver flags=flag packet_id=pkt_id"),
    (ndis.ObjectHeader, "ndis_object_header", "", "object_type=type revision=revision size=size"),
    (ndis.ChecksumOffload, "ndis_csum_offload", "", CHECKSUM),
    (ndis.LargeSendOffload, "ndis_lsov2_offload", "", LARGE_SEND),
    (
        ndis.Offload,
        "ndis_offload",
        "",
        OBJECT + inside("checksum=csum", CHECKSUM) + "large_send_v1=lsov1 ipsec_v1=ipsecv1 "
        "" + inside("large_send=lsov2", LARGE_SEND) + "flags=flags ipsec_v2=ipsecv2 rsc_ipv4=rsc.ip4 rsc_ipv6=rsc.ip6 hole=- "
        "encapsulation_flags=encap_gre.flags encapsulation_max_header=encap_gre.maxhdr",
    ),
    (
        ndis.OffloadParameters,
        "ndis_offload_params",
        "",
        OBJECT + "ipv4_checksum=ip_v4_csum tcp_ipv4_checksum=tcp_ip_v4_csum udp_ipv4_checksum=udp_ip_v4_csum "
        "tcp_ipv6_checksum=tcp_ip_v6_csum udp_ipv6_checksum=udp_ip_v6_csum lso_v1=lso_v1 ipsec_v1=ip_sec_v1 "
        "lso_v2_ipv4=lso_v2_ipv4 lso_v2_ipv6=lso_v2_ipv6 tcp_connection_ipv4=tcp_connection_ip_v4 "
        "tcp_connection_ipv6=tcp_connection_ip_v6 hole=- flags=flags ipsec_v2=ip_sec_v2 ipsec_v2_ipv4=ip_sec_v2_ip_v4 "
        "rsc_ipv4=rsc_ip_v4 rsc_ipv6=rsc_ip_v6 encapsulated_task_offload=encapsulated_packet_task_offload "
        "encapsulation_types=encapsulation_types hole2=-",
    ),
    (
        ndis.RssCapabilities,
        "ndis_recv_scale_cap",
        "",
        RSS_OBJECT + "flags=cap_flag interrupt_count=num_int_msg queue_count=num_recv_que table_entries=num_indirect_tabent",
    ),
    (
        ndis.RssParameters,
        "ndis_recv_scale_param",
        "",
        RSS_OBJECT + "flags=flag base_cpu=base_cpu_number hash=hashinfo table_size=indirect_tabsize hole=- "
        "table_offset=indirect_taboffset key_size=hashkey_size hole2=- key_offset=hashkey_offset "
        "processor_masks_offset=processor_masks_offset processor_mask_count=num_processor_masks "
        "processor_mask_size=processor_masks_entry_size",
    ),
    (
        ndis.ConfigParameter,
        "rndis_config_parameter_info",
        "",
        "name_offset=parameter_name_offset name_length=parameter_name_length value_type=parameter_type "
        "value_offset=parameter_value_offset value_length=parameter_value_length",
    ),
    (monitor.TriggerGroup, "hv_monitor_trigger_group", "", "pending=pending armed=armed"),
    (monitor.MonitorPage, "hv_monitor_page", "", "trigger_state=trigger_state reserved=rsvdz1 groups=trigger_group rest=-"),
    (dm.DmMessage, "dm_header", "", "message_type=type size=size transaction_id=trans_id"),
    (dm.VersionRequest, "dm_version_request", "", DM + "version=version flags=-"),
    (dm.VersionResponse, "dm_version_response", "", DM + "flags=-"),
    (
        dm.CapabilitiesReport,
        "dm_capabilities",
        "",
        DM + "capabilities=caps min_page_count=min_page_cnt max_page_number=max_page_number",
    ),
    (dm.CapabilitiesResponse, "dm_capabilities_resp_msg", "", DM + "flags=-"),
    (
        dm.StatusReport,
        "dm_status",
        "",
        DM + "available=num_avail committed=num_committed page_file_size=page_file_size zero_free=zero_free "
        "page_file_writes=page_file_writes io_diff=io_diff",
    ),
    (dm.BalloonRequest, "dm_balloon", "", DM + "page_count=num_pages reserved=reservedz"),
    (dm.BalloonResponse, "dm_balloon_response", "", DM + "reserved=reservedz flags=- ranges=range_array"),
    (dm.UnballoonRequest, "dm_unballoon_request", "", DM + "flags=- range_count=range_count ranges=range_array"),
    (dm.UnballoonResponse, "dm_unballoon_response", "", DM.strip()),
    (dm.HotAddRequest, "dm_hot_add", "", DM + "span=range region=-"),
    (dm.HotAddResponse, "dm_hot_add_response", "", DM + "page_count=page_count result=result"),
    (dm.InfoMessage, "dm_info_msg", "", DM + "reserved=reserved info_size=info_size"),
    (dm.InfoHeader, "dm_info_header", "", "info_type=type data_size=data_size"),
]

# What the kernel sends as a bare header, or knows without a structure of its own.
NOT_IN_BTF = {
    vmbus.RequestOffers: "a bare vmbus_channel_message_header",
    vmbus.AllOffersDelivered: "a bare vmbus_channel_message_header",
    vmbus.Unload: "a bare vmbus_channel_message_header",
    vmbus.UnloadResponse: "a bare vmbus_channel_message_header",
    ring.PacketFooter: "a u64 in hv_ringbuffer_write, the write index in its upper half",
    hyperv.SignalEvent: "union hv_connection_id and flag, which vmbus_set_event hands over as one number in a register",
}

ELSEWHERE = ("pci", "vfio", "vfio_user", "vfio_ioctl", "iommufd", "opened", "kvm")  # other specifications, or our own


def member(name: str, path: str) -> tuple[int, int]:
    """Offset and size in bytes of a kernel structure's member."""
    offset, bits = STRUCTS[name]["members"][path]
    assert offset % 8 == bits % 8 == 0
    return offset // 8, bits // 8


def place(name: str, part: str) -> tuple[int, int, str]:
    """Where our structure begins and ends in the kernel's, and what stands before the paths that begin with a dot."""
    if part == "":
        return 0, STRUCTS[name]["size"], ""
    if part.startswith("-"):
        return 0, int(part[1:]), ""
    begin, size = member(name, part.removeprefix("@"))
    return begin if part.startswith("@") else 0, begin + size, part.removeprefix("@")


@pytest.mark.parametrize(("kind", "name", "part", "table"), LAYOUTS, ids=[row[0].__name__ for row in LAYOUTS])
def test_sizes_and_offsets_are_the_kernels(kind, name, part, table):
    begin, end, prefix = place(name, part)
    rows = dict(row.split("=") for row in table.split())
    counted = nvsp.ReceiveSection.SIZE if kind is nvsp.SendReceiveBufferComplete else 0
    assert kind.SIZE + counted == end - begin
    assert list(rows) == list(kind.OFFSETS)
    fields = dict(flat(kind))
    for ours, theirs in rows.items():
        if theirs != "-":
            offset, size = member(name, prefix + theirs if theirs.startswith(".") else theirs)
            assert kind.OFFSETS[ours] == offset - begin, ours
            assert isinstance(fields[ours], Tail) or fields[ours].size == size, ours


def flat(kind: type[Struct]) -> Iterator[tuple[str, Codec]]:
    """The fields and those of nested structures, by the names that OFFSETS has."""
    for field in kind.FIELDS:
        yield field.name, field.codec
        if isinstance(field.codec, Nested):
            for inner, codec in flat(field.codec.kind):
                yield f"{field.name}.{inner}", codec


def test_no_structure_is_left_out():
    compared = {row[0] for row in LAYOUTS}
    of_hyperv = {kind for kind in all_structs() if kind.__module__.rpartition(".")[2] not in ELSEWHERE}
    assert compared | NOT_IN_BTF.keys() == of_hyperv
    assert not compared & NOT_IN_BTF.keys()
    for kind in NOT_IN_BTF.keys() - {ring.PacketFooter, hyperv.SignalEvent}:
        assert kind.OFFSETS == vmbus.Message.OFFSETS


# A bit field of ours -> the kernel's structure, the member that holds the bits, and our parts with the kernel's.
BIT_FIELDS: list[tuple[type[BitField], str, str, str]] = [
    (
        frame.TxChecksum,
        "ndis_tcp_ip_checksum_info",
        "transmit",
        "is_ipv4=is_ipv4 is_ipv6=is_ipv6 tcp_checksum=tcp_checksum udp_checksum=udp_checksum "
        "ip_header_checksum=ip_header_checksum tcp_header_offset=tcp_header_offset",
    ),
    (
        frame.RxChecksum,
        "ndis_tcp_ip_checksum_info",
        "receive",
        "tcp_failed=tcp_checksum_failed udp_failed=udp_checksum_failed ip_failed=ip_checksum_failed "
        "tcp_succeeded=tcp_checksum_succeeded udp_succeeded=udp_checksum_succeeded ip_succeeded=ip_checksum_succeeded "
        "loopback=loopback tcp_value_invalid=tcp_checksum_value_invalid ip_value_invalid=ip_checksum_value_invalid",
    ),
    (
        frame.LargeSend,
        "ndis_tcp_lso_info",
        "lso_v2_transmit",
        "mss=mss tcp_header_offset=tcp_header_offset version_2=type is_ipv6=ip_version",
    ),
    (frame.Vlan, "ndis_pkt_8021q_info", "", "priority=pri canonical_format=cfi vlan_id=vlanid"),
    (frame.PpiKind, "rndis_per_packet_info", "", "number=type internal=internal"),
    (
        nvsp.Capabilities,
        "nvsp_2_vsc_capability",
        "",
        "vmq=vmq chimney=chimney sriov=sriov ieee8021q=ieee8021q correlation_id=correlation_id teaming=teaming "
        "virtual_subnet_id=vsubnetid rsc=rsc",
    ),
    (vmbus.MonitorFlags, "vmbus_channel_offer_channel", "", "allocated=monitor_allocated"),
    (vmbus.InterruptFlags, "vmbus_channel_offer_channel", "", "dedicated=is_dedicated_interrupt"),
    (vmbus.TargetInfo, "vmbus_channel_initiate_contact", "", "sint=msg_sint vtl=msg_vtl feature_flags=-"),
    (ring.RingFeatures, "hv_ring_buffer", "feature_bits", "pending_send_size=feat_pending_send_sz"),
    (dm.LastAttempt, "dm_version_request", "", "is_last_attempt=is_last_attempt"),
    (dm.Accepted, "dm_version_response", "", "is_accepted=is_accepted hot_remove=- suppress_pressure_reports=-"),
    (
        dm.Capabilities,
        "dm_caps",
        "cap_bits",
        "balloon=balloon hot_add=hot_add hot_add_alignment=hot_add_alignment hot_remove=-",
    ),
    (dm.PageSpan, "dm_mem_page_range", "finfo", "start_page=start_page page_count=page_cnt"),
    (dm.RangesBefore, "dm_balloon_response", "", "more_pages=more_pages range_count=range_count"),
    (dm.MorePages, "dm_unballoon_request", "", "more_pages=more_pages"),
]
# Where the word that holds the bits begins in the kernel's structure, in bytes, when that is not where `part` is.
WORD_AT = {
    frame.PpiKind: 4,
    vmbus.MonitorFlags: 189,
    vmbus.InterruptFlags: 190,
    vmbus.TargetInfo: 16,
    dm.LastAttempt: 12,
    dm.Accepted: 8,
    dm.RangesBefore: 12,
    dm.MorePages: 8,
}


@pytest.mark.parametrize(("kind", "name", "part", "table"), BIT_FIELDS, ids=[row[0].__name__ for row in BIT_FIELDS])
def test_bits_are_where_the_kernel_has_them(kind, name, part, table):
    begin = 8 * WORD_AT[kind] if kind in WORD_AT else 8 * member(name, part)[0] if part else 0
    rows = dict(row.split("=") for row in table.split())
    assert list(rows) == list(kind.PARTS)
    for ours, theirs in rows.items():
        if theirs != "-":
            offset, bits = STRUCTS[name]["members"][f"{part}.{theirs}" if part else theirs]
            assert (kind.PARTS[ours].shift, kind.PARTS[ours].width) == (offset - begin, bits), ours


def test_words_that_hold_bits_are_the_fields_of_our_structures():
    assert frame.PpiHeader.OFFSETS["kind"] == WORD_AT[frame.PpiKind]
    assert vmbus.OfferChannel.OFFSETS["monitor"] == WORD_AT[vmbus.MonitorFlags]
    assert vmbus.OfferChannel.OFFSETS["interrupt"] == WORD_AT[vmbus.InterruptFlags]
    assert vmbus.InitiateContact.OFFSETS["target_info"] == WORD_AT[vmbus.TargetInfo]
    assert dm.VersionRequest.OFFSETS["flags"] == WORD_AT[dm.LastAttempt]
    assert dm.VersionResponse.OFFSETS["flags"] == dm.CapabilitiesResponse.OFFSETS["flags"] == WORD_AT[dm.Accepted]
    assert STRUCTS["dm_capabilities_resp_msg"]["members"]["is_accepted"] == [64, 1]
    assert dm.BalloonResponse.OFFSETS["flags"] == WORD_AT[dm.RangesBefore]
    assert dm.UnballoonRequest.OFFSETS["flags"] == WORD_AT[dm.MorePages]
    assert STRUCTS["vmbus_channel_offer_channel"]["members"]["reserved"] == [8 * 189 + 1, 7]
    assert STRUCTS["vmbus_channel_offer_channel"]["members"]["reserved1"] == [8 * 190 + 1, 15]


VMBUS_NUMBERS = {kind.NUMBER for kind in vmbus.TABLE}


@pytest.mark.parametrize("number", sorted(VMBUS_NUMBERS))
def test_channel_messages_have_the_kernels_numbers(number):
    (name,) = [
        name for name, value in vars(vmbus).items() if name.isupper() and f"CHANNELMSG_{name}" in ENUMERATORS and value == number
    ]
    assert ENUMERATORS[f"CHANNELMSG_{name}"] == number


ENUMERATED = {
    (ring, "PACKET_"): {
        "SYNCH": "VM_PKT_SYNCH",
        "ADD_XFER_PAGESET": "VM_PKT_ADD_XFER_PAGESET",
        "RM_XFER_PAGESET": "VM_PKT_RM_XFER_PAGESET",
        "ESTABLISH_GPADL": "VM_PKT_ESTABLISH_GPADL",
        "TEARDOWN_GPADL": "VM_PKT_TEARDOWN_GPADL",
        "INBAND": "VM_PKT_DATA_INBAND",
        "XFER_PAGES": "VM_PKT_DATA_USING_XFER_PAGES",
        "GPADL": "VM_PKT_DATA_USING_GPADL",
        "GPA_DIRECT": "VM_PKT_DATA_USING_GPA_DIRECT",
        "CANCEL_REQUEST": "VM_PKT_CANCEL_REQUEST",
        "COMPLETION": "VM_PKT_COMP",
        "ADDITIONAL_PACKETS": "VM_PKT_DATA_USING_ADDITIONAL_PKT",
        "ADDITIONAL_DATA": "VM_PKT_ADDITIONAL_DATA",
    },
    (nvsp, ""): {
        "INIT": "NVSP_MSG_TYPE_INIT",
        "INIT_COMPLETE": "NVSP_MSG_TYPE_INIT_COMPLETE",
        "SEND_NDIS_VERSION": "NVSP_MSG1_TYPE_SEND_NDIS_VER",
        "SEND_RECEIVE_BUFFER": "NVSP_MSG1_TYPE_SEND_RECV_BUF",
        "SEND_RECEIVE_BUFFER_COMPLETE": "NVSP_MSG1_TYPE_SEND_RECV_BUF_COMPLETE",
        "REVOKE_RECEIVE_BUFFER": "NVSP_MSG1_TYPE_REVOKE_RECV_BUF",
        "SEND_SEND_BUFFER": "NVSP_MSG1_TYPE_SEND_SEND_BUF",
        "SEND_SEND_BUFFER_COMPLETE": "NVSP_MSG1_TYPE_SEND_SEND_BUF_COMPLETE",
        "REVOKE_SEND_BUFFER": "NVSP_MSG1_TYPE_REVOKE_SEND_BUF",
        "SEND_RNDIS_PACKET": "NVSP_MSG1_TYPE_SEND_RNDIS_PKT",
        "SEND_RNDIS_PACKET_COMPLETE": "NVSP_MSG1_TYPE_SEND_RNDIS_PKT_COMPLETE",
        "SEND_NDIS_CONFIG": "NVSP_MSG2_TYPE_SEND_NDIS_CONFIG",
        "SEND_VF_ASSOCIATION": "NVSP_MSG4_TYPE_SEND_VF_ASSOCIATION",
        "SWITCH_DATA_PATH": "NVSP_MSG4_TYPE_SWITCH_DATA_PATH",
        "SUBCHANNEL": "NVSP_MSG5_TYPE_SUBCHANNEL",
        "SEND_INDIRECTION_TABLE": "NVSP_MSG5_TYPE_SEND_INDIRECTION_TABLE",
        "PD_API": "NVSP_MSG6_TYPE_PD_API",
        "DATA_PATH_SYNTHETIC": "NVSP_DATAPATH_SYNTHETIC",
        "DATA_PATH_VF": "NVSP_DATAPATH_VF",
        "SUBCHANNEL_ALLOCATE": "NVSP_SUBCHANNEL_ALLOCATE",
    },
    (nvsp, "STATUS_"): {
        "NONE": "NVSP_STAT_NONE",
        "SUCCESS": "NVSP_STAT_SUCCESS",
        "FAIL": "NVSP_STAT_FAIL",
        "PROTOCOL_TOO_NEW": "NVSP_STAT_PROTOCOL_TOO_NEW",
        "PROTOCOL_TOO_OLD": "NVSP_STAT_PROTOCOL_TOO_OLD",
        "INVALID_RNDIS_PACKET": "NVSP_STAT_INVALID_RNDIS_PKT",
        "BUSY": "NVSP_STAT_BUSY",
        "PROTOCOL_UNSUPPORTED": "NVSP_STAT_PROTOCOL_UNSUPPORTED",
    },
    (dm, ""): {
        "ERROR": "DM_ERROR",
        "VERSION_REQUEST": "DM_VERSION_REQUEST",
        "VERSION_RESPONSE": "DM_VERSION_RESPONSE",
        "CAPABILITIES_REPORT": "DM_CAPABILITIES_REPORT",
        "CAPABILITIES_RESPONSE": "DM_CAPABILITIES_RESPONSE",
        "STATUS_REPORT": "DM_STATUS_REPORT",
        "BALLOON_REQUEST": "DM_BALLOON_REQUEST",
        "BALLOON_RESPONSE": "DM_BALLOON_RESPONSE",
        "UNBALLOON_REQUEST": "DM_UNBALLOON_REQUEST",
        "UNBALLOON_RESPONSE": "DM_UNBALLOON_RESPONSE",
        "MEM_HOT_ADD_REQUEST": "DM_MEM_HOT_ADD_REQUEST",
        "MEM_HOT_ADD_RESPONSE": "DM_MEM_HOT_ADD_RESPONSE",
        "INFO_MESSAGE": "DM_INFO_MESSAGE",
        "INFO_TYPE_MAX_PAGE_CNT": "INFO_TYPE_MAX_PAGE_CNT",
        "VERSION_0_3": "DYNMEM_PROTOCOL_VERSION_1",
        "VERSION_1": "DYNMEM_PROTOCOL_VERSION_2",
        "VERSION_2": "DYNMEM_PROTOCOL_VERSION_3",
    },
    (frame, "PPI_"): {
        "CHECKSUM": "TCPIP_CHKSUM_PKTINFO",
        "IPSEC": "IPSEC_PKTINFO",
        "LARGE_SEND": "TCP_LARGESEND_PKTINFO",
        "VLAN": "IEEE_8021Q_INFO",
        "HASH": "NBL_HASH_VALUE",
        "INTERNAL_PACKET_ID": "RNDIS_PKTINFO_ID",
    },
    (vmbus, ""): {
        "MESSAGE_CONNECTION_ID": "VMBUS_MESSAGE_CONNECTION_ID",
        "MESSAGE_CONNECTION_ID_4": "VMBUS_MESSAGE_CONNECTION_ID_4",
        "MESSAGE_CONNECTION_ID_REDIRECT": "VMBUS_MESSAGE_CONNECTION_ID_REDIRECT",
        "MESSAGE_SINT": "VMBUS_MESSAGE_SINT",
    },
}


@pytest.mark.parametrize(
    ("module", "ours", "theirs"),
    [(module, prefix + ours, theirs) for (module, prefix), rows in ENUMERATED.items() for ours, theirs in rows.items()],
)
def test_numbers_are_the_kernels(module, ours, theirs):
    assert getattr(module, ours) == ENUMERATORS[theirs]


@pytest.mark.parametrize("module", [nvsp, dm])
def test_every_message_of_ours_was_compared(module):
    compared = {getattr(module, ours) for ours in ENUMERATED[module, ""]}
    assert {kind.NUMBER for kind in module.TABLE} <= compared


# Macros leave no trace in BTF. But netvsc and vmbus themselves hold each number that they use, so one that stands
# nowhere in their code and data is wrong. What the drivers do not use is compared with nothing.
USED_BY_THE_DRIVERS = {
    **{
        name: getattr(oid, name)
        for name in (
            "OID_GEN_MAXIMUM_FRAME_SIZE",
            "OID_GEN_LINK_SPEED",
            "OID_GEN_CURRENT_PACKET_FILTER",
            "OID_GEN_MEDIA_CONNECT_STATUS",
            "OID_GEN_RECEIVE_SCALE_CAPABILITIES",
            "OID_GEN_RECEIVE_SCALE_PARAMETERS",
            "OID_GEN_RNDIS_CONFIG_PARAMETER",
            "OID_GEN_FRIENDLY_NAME",
            "OID_802_3_PERMANENT_ADDRESS",
            "OID_TCP_OFFLOAD_PARAMETERS",
            "OID_TCP_OFFLOAD_HARDWARE_CAPABILITIES",
            "STATUS_MEDIA_CONNECT",
            "STATUS_MEDIA_DISCONNECT",
            "STATUS_LINK_SPEED_CHANGE",
            "STATUS_NETWORK_CHANGE",
        )
    },
    "INITIALIZE_COMPLETE": rndis.INITIALIZE_COMPLETE,
    "QUERY_COMPLETE": rndis.QUERY_COMPLETE,
    "SET_COMPLETE": rndis.SET_COMPLETE,
    "KEEPALIVE_COMPLETE": rndis.KEEPALIVE_COMPLETE,
    "nvsp.VERSION_2": nvsp.VERSION_2,
    "nvsp.VERSION_6_1": nvsp.VERSION_6_1,
    **{f"VMBus {vmbus.version_text(version)}": version for version in vmbus.SUPPORTED_VERSIONS},
}


@pytest.mark.parametrize("name", USED_BY_THE_DRIVERS)
def test_macros_stand_in_the_drivers(name):
    assert CONSTANTS[f"{USED_BY_THE_DRIVERS[name]:#010x}"] > 0


@pytest.mark.parametrize("name", guids.CLASS_GUIDS)
def test_class_guids_stand_in_the_drivers(name):
    assert CONSTANTS[str(guids.CLASS_GUIDS[name])] > 0


def test_limits_are_those_of_the_kernels_structures():
    assert STRUCTS["hv_message"]["size"] - STRUCTS["hv_message_header"]["size"] == vmbus.MAX_MESSAGE_SIZE
    assert STRUCTS["nvsp_message"]["size"] == nvsp.MESSAGE_SIZE
    assert STRUCTS["hv_ring_buffer"]["size"] == ring.CONTROL_PAGE_SIZE
    assert ndis.Offload.OFFSETS["ipsec_v2"] == ndis.OFFLOAD_SIZE_6_0
    assert ndis.Offload.OFFSETS["rsc_ipv4"] == ndis.OFFLOAD_SIZE_6_1
    ranges = STRUCTS["vmbus_channel_packet_page_buffer"]
    assert (ranges["size"] - ring.GpaDirectHeader.SIZE) // ring.PageBuffer.SIZE == ring.MAX_PAGE_BUFFERS
    assert STRUCTS["vmbus_channel_offer"]["members"]["u.pipe.user_def"][1] // 8 == vmbus.MAX_PIPE_USER_DATA
