"""VFIO: what a driver sees of a device (`device`), the PCI personality of a VMBus connection (`registers`, `config`, `function`;
docs/pci-personality.md is its specification), and the device in this process (`inprocess`)."""
