"""The software IOMMU: what a client's addresses mean, and what it may reach.

`domain` is the host's side (IOVA to memory, faults), `translation` the same lookup for kernels, `dma` the driver's side
(IOVAs, buffers that a device may reach).
"""
