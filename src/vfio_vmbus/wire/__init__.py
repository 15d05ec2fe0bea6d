"""Declarations of everything that goes over a wire or lies in shared memory; nothing here acts.

    layout, bits, table   the means: structures, bit fields, tables of messages
    vmbus, guids, gpa     the control messages, the classes of devices, lists of pages
    ring                  control page and packets
    nvsp                  the network card's own messages
    rndis, frame          its control messages and its frames
    dm                    the balloon's messages: dynamic memory
    monitor               the page by which a guest signals monitored channels
    oid, ndis             what these are about: numbers, and the objects that they carry
    pci                   configuration space and MSI-X
    vfio                  devices as VFIO shows them
    vfio_ioctl, iommufd   the kernel's ioctls for them, and for IO address spaces
    opened                a VMBus device that its server has opened, as regions
    vfio_user             the same over a socket; vfio_user_version: what its ends tell each other first

One field table per structure gives the class, its size, its offsets and its numpy dtype. Importing any of it
loads neither numpy nor numba. Layouts and numbers are tested against the kernel's own (tests/wire).
"""
