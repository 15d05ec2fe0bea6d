"""VFIO: what a driver sees of a device (`device`), the PCI personality of a VMBus connection (`registers`, `config`, `function`;
docs/pci-personality.md is its specification), the device in this process (`inprocess`), and a vfio-user server's protocol core
(`user_core`, `user_commands`; `user_device` is what it serves) and connection (`user_connection`)."""
