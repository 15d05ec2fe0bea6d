"""VFIO: what a driver sees of a device (`device`), the PCI personality of a VMBus connection (`registers`, `function`), and the
device in this process (`inprocess`)."""
