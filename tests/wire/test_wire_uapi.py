"""The kernel's VFIO and iommufd: our declarations against what a C compiler makes of the kernel's headers.

tests/fixtures/uapi holds those of a new kernel and of an old one; the headers of this machine are asked as well.
"""

from __future__ import annotations

import importlib.util
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.wire.strategies import all_structs
from vfio_vmbus.wire import iommufd, vfio, vfio_ioctl
from vfio_vmbus.wire.layout import Struct

FIXTURES = Path(__file__).parent.parent / "fixtures/uapi"
WANTED = FIXTURES / "wanted.txt"
TOOL = Path(__file__).parents[2] / "tools/uapi_extract.py"
SPEC = importlib.util.spec_from_file_location("uapi_extract", TOOL)
assert SPEC is not None
assert SPEC.loader is not None
uapi_extract = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(uapi_extract)

# Ours -> the kernel's structure, and our fields with its members ("-": a hole, or reserved without a name).
STRUCTS: dict[type[Struct], tuple[str, str]] = {
    vfio_ioctl.GroupStatus: ("vfio_group_status", "argsz=argsz flags=flags"),
    vfio_ioctl.DeviceInfo: (
        "vfio_device_info",
        "argsz=argsz flags=flags region_count=num_regions irq_count=num_irqs cap_offset=cap_offset padding=-",
    ),
    vfio.RegionInfo: (
        "vfio_region_info",
        "argsz=argsz flags=flags index=index cap_offset=cap_offset size=size offset=offset",
    ),
    vfio.CapabilityHeader: ("vfio_info_cap_header", "id=id version=version next=next"),
    vfio.SparseArea: ("vfio_region_sparse_mmap_area", "offset=offset size=size"),
    vfio.SparseMmap: ("vfio_region_info_cap_sparse_mmap", "header=header area_count=nr_areas reserved=reserved areas=areas"),
    vfio.RegionType: ("vfio_region_info_cap_type", "header=header type=type subtype=subtype"),
    vfio.IrqInfo: ("vfio_irq_info", "argsz=argsz flags=flags index=index count=count"),
    vfio.IrqSet: ("vfio_irq_set", "argsz=argsz flags=flags index=index start=start count=count"),
    vfio.Feature: ("vfio_device_feature", "argsz=argsz flags=flags"),
    vfio_ioctl.DependentDevice: ("vfio_pci_dependent_device", "owner=group_id segment=segment bus=bus devfn=devfn"),
    vfio_ioctl.HotResetInfo: ("vfio_pci_hot_reset_info", "argsz=argsz flags=flags count=count devices=devices"),
    vfio_ioctl.HotReset: ("vfio_pci_hot_reset", "argsz=argsz flags=flags count=count group_fds=group_fds"),
    vfio_ioctl.IoEventFd: (
        "vfio_device_ioeventfd",
        "argsz=argsz flags=flags offset=offset data=data fd=fd reserved=reserved",
    ),
    vfio_ioctl.BusMaster: ("vfio_device_feature_bus_master", "op=op"),
    vfio_ioctl.BindIommufd: (
        "vfio_device_bind_iommufd",
        "argsz=argsz flags=flags iommufd=iommufd out_devid=out_devid token=token_uuid_ptr",
    ),
    vfio_ioctl.AttachIommufd: ("vfio_device_attach_iommufd_pt", "argsz=argsz flags=flags pt_id=pt_id pasid=pasid"),
    vfio_ioctl.DetachIommufd: ("vfio_device_detach_iommufd_pt", "argsz=argsz flags=flags pasid=pasid"),
    vfio_ioctl.Type1Info: (
        "vfio_iommu_type1_info",
        "argsz=argsz flags=flags page_sizes=iova_pgsizes cap_offset=cap_offset padding=-",
    ),
    vfio_ioctl.IovaRange: ("vfio_iova_range", "start=start last=end"),
    vfio_ioctl.IovaRanges: (
        "vfio_iommu_type1_info_cap_iova_range",
        "header=header range_count=nr_iovas reserved=reserved ranges=iova_ranges",
    ),
    vfio_ioctl.Type1Migration: (
        "vfio_iommu_type1_info_cap_migration",
        "header=header flags=flags padding=- page_sizes=pgsize_bitmap max_bitmap_size=max_dirty_bitmap_size",
    ),
    vfio_ioctl.DmaAvailable: ("vfio_iommu_type1_info_dma_avail", "header=header available=avail"),
    vfio_ioctl.Type1Map: ("vfio_iommu_type1_dma_map", "argsz=argsz flags=flags vaddr=vaddr iova=iova size=size"),
    vfio_ioctl.Type1Unmap: ("vfio_iommu_type1_dma_unmap", "argsz=argsz flags=flags iova=iova size=size"),
    vfio_ioctl.Bitmap: ("vfio_bitmap", "page_size=pgsize size=size data=data"),
    vfio_ioctl.DmaLoggingControl: (
        "vfio_device_feature_dma_logging_control",
        "page_size=page_size range_count=num_ranges reserved=__reserved ranges=ranges",
    ),
    vfio_ioctl.DmaLoggingRange: ("vfio_device_feature_dma_logging_range", "iova=iova length=length"),
    vfio_ioctl.DmaLoggingReport: (
        "vfio_device_feature_dma_logging_report",
        "iova=iova length=length page_size=page_size bitmap=bitmap",
    ),
    iommufd.Destroy: ("iommu_destroy", "size=size id=id"),
    iommufd.IoasAlloc: ("iommu_ioas_alloc", "size=size flags=flags out_ioas_id=out_ioas_id"),
    iommufd.IommuIovaRange: ("iommu_iova_range", "start=start last=last"),
    iommufd.IoasIovaRanges: (
        "iommu_ioas_iova_ranges",
        "size=size ioas_id=ioas_id range_count=num_iovas reserved=__reserved allowed_iovas=allowed_iovas "
        "out_alignment=out_iova_alignment",
    ),
    iommufd.IoasAllowIovas: (
        "iommu_ioas_allow_iovas",
        "size=size ioas_id=ioas_id range_count=num_iovas reserved=__reserved allowed_iovas=allowed_iovas",
    ),
    iommufd.IoasMap: (
        "iommu_ioas_map",
        "size=size flags=flags ioas_id=ioas_id reserved=__reserved user_va=user_va length=length iova=iova",
    ),
    iommufd.IoasMapFile: (
        "iommu_ioas_map_file",
        "size=size flags=flags ioas_id=ioas_id fd=fd start=start length=length iova=iova",
    ),
    iommufd.IoasCopy: (
        "iommu_ioas_copy",
        "size=size flags=flags dst_ioas_id=dst_ioas_id src_ioas_id=src_ioas_id length=length dst_iova=dst_iova src_iova=src_iova",
    ),
    iommufd.IoasUnmap: ("iommu_ioas_unmap", "size=size ioas_id=ioas_id iova=iova length=length"),
    iommufd.Option: (
        "iommu_option",
        "size=size option_id=option_id op=op reserved=__reserved object_id=object_id value=val64",
    ),
    iommufd.VfioIoas: ("iommu_vfio_ioas", "size=size ioas_id=ioas_id op=op reserved=__reserved"),
}
# Structures that grew: Linux 6.12 has so many bytes of them.
SIZES_6_12 = {
    vfio_ioctl.BindIommufd: vfio_ioctl.BIND_IOMMUFD_SIZE_6_12,
    vfio_ioctl.AttachIommufd: vfio_ioctl.ATTACH_IOMMUFD_SIZE_6_12,
    vfio_ioctl.DetachIommufd: vfio_ioctl.DETACH_IOMMUFD_SIZE_6_12,
}
DEVICE_INFO_SIZE_6_1 = 20

FROM_VFIO = (
    "REGION_READ=REGION_INFO_FLAG_READ REGION_WRITE=REGION_INFO_FLAG_WRITE REGION_MMAP=REGION_INFO_FLAG_MMAP "
    "REGION_CAPS=REGION_INFO_FLAG_CAPS DEVICE_RESET=DEVICE_FLAGS_RESET DEVICE_PCI=DEVICE_FLAGS_PCI IRQ_EVENTFD=IRQ_INFO_EVENTFD "
    "IRQ_MASKABLE=IRQ_INFO_MASKABLE IRQ_AUTOMASKED=IRQ_INFO_AUTOMASKED IRQ_NORESIZE=IRQ_INFO_NORESIZE "
    "SET_DATA_NONE=IRQ_SET_DATA_NONE SET_DATA_BOOL=IRQ_SET_DATA_BOOL SET_DATA_EVENTFD=IRQ_SET_DATA_EVENTFD "
    "SET_ACTION_MASK=IRQ_SET_ACTION_MASK SET_ACTION_UNMASK=IRQ_SET_ACTION_UNMASK SET_ACTION_TRIGGER=IRQ_SET_ACTION_TRIGGER "
    "FEATURE_INDEX=DEVICE_FEATURE_MASK FEATURE_GET=DEVICE_FEATURE_GET FEATURE_SET=DEVICE_FEATURE_SET "
    "FEATURE_PROBE=DEVICE_FEATURE_PROBE DMA_READ=DMA_MAP_FLAG_READ DMA_WRITE=DMA_MAP_FLAG_WRITE "
    "CAPABILITY_SPARSE_MMAP=REGION_INFO_CAP_SPARSE_MMAP CAPABILITY_TYPE=REGION_INFO_CAP_TYPE "
    "CAPABILITY_MSIX_MAPPABLE=REGION_INFO_CAP_MSIX_MAPPABLE REGION_BAR0=PCI_BAR0_REGION_INDEX REGION_BAR5=PCI_BAR5_REGION_INDEX "
    "REGION_ROM=PCI_ROM_REGION_INDEX REGION_CONFIG=PCI_CONFIG_REGION_INDEX REGION_VGA=PCI_VGA_REGION_INDEX "
    "PCI_REGIONS=PCI_NUM_REGIONS IRQ_INTX=PCI_INTX_IRQ_INDEX IRQ_MSI=PCI_MSI_IRQ_INDEX IRQ_MSIX=PCI_MSIX_IRQ_INDEX "
    "IRQ_ERR=PCI_ERR_IRQ_INDEX IRQ_REQ=PCI_REQ_IRQ_INDEX PCI_IRQS=PCI_NUM_IRQS"
)
FROM_IOCTL = (
    "API_VERSION=API_VERSION GET_API_VERSION=GET_API_VERSION CHECK_EXTENSION=CHECK_EXTENSION SET_IOMMU=SET_IOMMU "
    "IOMMU_GET_INFO=IOMMU_GET_INFO IOMMU_MAP_DMA=IOMMU_MAP_DMA IOMMU_UNMAP_DMA=IOMMU_UNMAP_DMA IOMMU_DIRTY_PAGES=IOMMU_DIRTY_PAGES "
    "GROUP_GET_STATUS=GROUP_GET_STATUS GROUP_SET_CONTAINER=GROUP_SET_CONTAINER GROUP_UNSET_CONTAINER=GROUP_UNSET_CONTAINER "
    "GROUP_GET_DEVICE_FD=GROUP_GET_DEVICE_FD DEVICE_GET_INFO=DEVICE_GET_INFO DEVICE_GET_REGION_INFO=DEVICE_GET_REGION_INFO "
    "DEVICE_GET_IRQ_INFO=DEVICE_GET_IRQ_INFO DEVICE_SET_IRQS=DEVICE_SET_IRQS DEVICE_RESET=DEVICE_RESET "
    "DEVICE_GET_PCI_HOT_RESET_INFO=DEVICE_GET_PCI_HOT_RESET_INFO DEVICE_PCI_HOT_RESET=DEVICE_PCI_HOT_RESET "
    "DEVICE_QUERY_GFX_PLANE=DEVICE_QUERY_GFX_PLANE DEVICE_GET_GFX_DMABUF=DEVICE_GET_GFX_DMABUF DEVICE_IOEVENTFD=DEVICE_IOEVENTFD "
    "DEVICE_FEATURE=DEVICE_FEATURE DEVICE_BIND_IOMMUFD=DEVICE_BIND_IOMMUFD DEVICE_ATTACH_IOMMUFD_PT=DEVICE_ATTACH_IOMMUFD_PT "
    "DEVICE_DETACH_IOMMUFD_PT=DEVICE_DETACH_IOMMUFD_PT MIG_GET_PRECOPY_INFO=MIG_GET_PRECOPY_INFO TYPE1_IOMMU=TYPE1_IOMMU "
    "TYPE1V2_IOMMU=TYPE1v2_IOMMU DMA_CC_IOMMU=DMA_CC_IOMMU SPAPR_TCE_V2_IOMMU=SPAPR_TCE_v2_IOMMU NOIOMMU_IOMMU=NOIOMMU_IOMMU "
    "UNMAP_ALL=UNMAP_ALL UPDATE_VADDR=UPDATE_VADDR GROUP_VIABLE=GROUP_FLAGS_VIABLE GROUP_CONTAINER_SET=GROUP_FLAGS_CONTAINER_SET "
    "DEVICE_CAPS=DEVICE_FLAGS_CAPS HOT_RESET_DEV_ID=PCI_HOT_RESET_FLAG_DEV_ID "
    "HOT_RESET_DEV_ID_OWNED=PCI_HOT_RESET_FLAG_DEV_ID_OWNED DEV_ID_OWNED=PCI_DEVID_OWNED DEV_ID_NOT_OWNED=PCI_DEVID_NOT_OWNED "
    "FEATURE_VF_TOKEN=DEVICE_FEATURE_PCI_VF_TOKEN "
    "FEATURE_LOW_POWER_ENTRY=DEVICE_FEATURE_LOW_POWER_ENTRY "
    "FEATURE_LOW_POWER_ENTRY_WITH_WAKEUP=DEVICE_FEATURE_LOW_POWER_ENTRY_WITH_WAKEUP "
    "FEATURE_LOW_POWER_EXIT=DEVICE_FEATURE_LOW_POWER_EXIT FEATURE_MIG_DATA_SIZE=DEVICE_FEATURE_MIG_DATA_SIZE "
    "FEATURE_BUS_MASTER=DEVICE_FEATURE_BUS_MASTER BUS_MASTER_CLEAR=DEVICE_FEATURE_CLEAR_MASTER "
    "BUS_MASTER_SET=DEVICE_FEATURE_SET_MASTER TYPE1_PAGE_SIZES=IOMMU_INFO_PGSIZES TYPE1_CAPS=IOMMU_INFO_CAPS "
    "CAPABILITY_IOVA_RANGES=IOMMU_TYPE1_INFO_CAP_IOVA_RANGE CAPABILITY_MIGRATION=IOMMU_TYPE1_INFO_CAP_MIGRATION "
    "CAPABILITY_DMA_AVAILABLE=IOMMU_TYPE1_INFO_DMA_AVAIL MAP_VADDR=DMA_MAP_FLAG_VADDR "
    "UNMAP_GET_DIRTY_BITMAP=DMA_UNMAP_FLAG_GET_DIRTY_BITMAP UNMAP_FLAG_ALL=DMA_UNMAP_FLAG_ALL UNMAP_VADDR=DMA_UNMAP_FLAG_VADDR "
    "BIND_TOKEN=DEVICE_BIND_FLAG_TOKEN ATTACH_PASID=DEVICE_ATTACH_PASID"
)
FROM_IOMMUFD = (
    "DESTROY=IOMMU_DESTROY IOAS_ALLOC=IOMMU_IOAS_ALLOC IOAS_ALLOW_IOVAS=IOMMU_IOAS_ALLOW_IOVAS IOAS_COPY=IOMMU_IOAS_COPY "
    "IOAS_IOVA_RANGES=IOMMU_IOAS_IOVA_RANGES IOAS_MAP=IOMMU_IOAS_MAP IOAS_UNMAP=IOMMU_IOAS_UNMAP OPTION=IOMMU_OPTION "
    "VFIO_IOAS=IOMMU_VFIO_IOAS HWPT_ALLOC=IOMMU_HWPT_ALLOC GET_HW_INFO=IOMMU_GET_HW_INFO "
    "HWPT_SET_DIRTY_TRACKING=IOMMU_HWPT_SET_DIRTY_TRACKING HWPT_GET_DIRTY_BITMAP=IOMMU_HWPT_GET_DIRTY_BITMAP "
    "HWPT_INVALIDATE=IOMMU_HWPT_INVALIDATE FAULT_QUEUE_ALLOC=IOMMU_FAULT_QUEUE_ALLOC IOAS_MAP_FILE=IOMMU_IOAS_MAP_FILE "
    "MAP_FIXED_IOVA=IOMMU_IOAS_MAP_FIXED_IOVA MAP_WRITEABLE=IOMMU_IOAS_MAP_WRITEABLE MAP_READABLE=IOMMU_IOAS_MAP_READABLE "
    "OPTION_RLIMIT_MODE=IOMMU_OPTION_RLIMIT_MODE OPTION_HUGE_PAGES=IOMMU_OPTION_HUGE_PAGES OPTION_SET=IOMMU_OPTION_OP_SET "
    "OPTION_GET=IOMMU_OPTION_OP_GET VFIO_IOAS_GET=IOMMU_VFIO_IOAS_GET VFIO_IOAS_SET=IOMMU_VFIO_IOAS_SET "
    "VFIO_IOAS_CLEAR=IOMMU_VFIO_IOAS_CLEAR"
)
NUMBERS = {
    (module, ours): prefix + theirs
    for module, prefix, table in ((vfio, "VFIO_", FROM_VFIO), (vfio_ioctl, "VFIO_", FROM_IOCTL), (iommufd, "", FROM_IOMMUFD))
    for ours, theirs in (row.split("=") for row in table.split())
}


def kernels() -> list[Any]:
    """Every kernel whose headers were asked, or can be."""
    found = [pytest.param(json.loads(path.read_text()), id=path.stem) for path in sorted(FIXTURES.glob("*.json"))]
    return [*found, pytest.param(None, id="this machine")]


@pytest.fixture
def answers(request: pytest.FixtureRequest) -> dict[str, Any]:
    if request.param is not None:
        return dict(request.param)
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip("no C compiler on this machine to ask its headers with; the fixtures were compared")
    if not Path("/usr/include/linux/vfio.h").is_file():
        pytest.skip("no /usr/include/linux/vfio.h on this machine; the fixtures were compared")
    return dict(uapi_extract.extract(Path("/usr/include"), uapi_extract.parse(WANTED.read_text()), compiler))


@pytest.mark.parametrize("answers", kernels(), indirect=True)
def test_sizes_and_offsets_are_the_kernels(answers: dict[str, Any]) -> None:
    compared = 0
    for kind, (name, table) in STRUCTS.items():
        rows = dict(row.split("=") for row in table.split())
        top = {field.name: field.offset for field in kind.FIELDS}
        assert list(rows) == list(top), name
        if name not in answers["structs"]:
            continue
        compared += 1
        theirs = answers["structs"][name]
        assert theirs["size"] in (kind.SIZE, SIZES_6_12.get(kind), kind is vfio_ioctl.DeviceInfo and DEVICE_INFO_SIZE_6_1), name
        for ours, member in rows.items():
            if member != "-" and member in theirs["members"]:
                assert theirs["members"][member] == top[ours], f"{name}.{member}"
            elif member != "-" and ours != "reserved":  # which old headers have without a name
                assert theirs["size"] == SIZES_6_12[kind] <= top[ours], f"{name}.{member}"
    assert compared >= 24


@pytest.mark.parametrize("answers", kernels(), indirect=True)
def test_numbers_are_the_kernels(answers: dict[str, Any]) -> None:
    wrong = {
        theirs: (getattr(module, ours), answers["numbers"][theirs])
        for (module, ours), theirs in NUMBERS.items()
        if theirs in answers["numbers"] and getattr(module, ours) != answers["numbers"][theirs] % (1 << 32)
    }
    assert wrong == {}
    assert len(answers["numbers"]) > 70


def test_the_newest_kernel_has_them_all() -> None:
    newest = json.loads((FIXTURES / "linux-7.3.json").read_text())
    assert {name for name, _ in STRUCTS.values()} == newest["structs"].keys()
    assert set(NUMBERS.values()) == newest["numbers"].keys()
    for kind, (name, _) in STRUCTS.items():
        assert newest["structs"][name]["size"] == kind.SIZE


def test_the_old_kernel_has_the_sizes_that_we_say_it_has() -> None:
    old = json.loads((FIXTURES / "linux-6.12.json").read_text())
    assert {STRUCTS[kind][0]: size for kind, size in SIZES_6_12.items()} == {
        STRUCTS[kind][0]: old["structs"][STRUCTS[kind][0]]["size"] for kind in SIZES_6_12
    }
    assert "iommu_ioas_map_file" not in old["structs"]


def test_nothing_is_left_out() -> None:
    ours = {kind for kind in all_structs() if kind.__module__ in (vfio_ioctl.__name__, iommufd.__name__, vfio.__name__)}
    assert ours == STRUCTS.keys()
    for module in (vfio_ioctl, iommufd):
        limits = {name for name in vars(module) if name.startswith("MAX_") or name.endswith("_6_12")}
        named = {name for name, value in vars(module).items() if name.isupper() and isinstance(value, int)} - limits
        assert named - {ours for owner, ours in NUMBERS if owner is module} <= {"S32", "U8", "U16", "U32", "U64"}


def test_a_header_without_a_thing_is_asked_for_the_rest(tmp_path: Path) -> None:
    (tmp_path / "linux").mkdir()
    (tmp_path / "linux/made.h").write_text("#define ONE 1\nstruct pair {\n int a; /* and b */\n};\n")
    wanted = uapi_extract.parse("<linux/made.h>\nstruct pair a b # a remark\nstruct none x\nONE TWO\n<linux/gone.h>\nTHREE\n")
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip("no C compiler on this machine")
    assert uapi_extract.extract(tmp_path, wanted, compiler) == {
        "structs": {"pair": {"size": 4, "members": {"a": 0}}},
        "numbers": {"ONE": 1},
    }
