"""VFIO: what a driver sees of a device (`device`), the PCI personality of a VMBus connection (`registers`, `config`, `function`;
docs/pci-personality.md is its specification), the device in this process (`inprocess`), vfio-user's server and client (`user`), and devices
that the kernel has (`kernel`)."""
