"""VFIO: what a driver sees of a device (`device`), the PCI personality of a VMBus connection (`registers`, `config`, `function`;
docs/pci-personality.md is its specification), the device in this process (`inprocess`), a vfio-user
server (`user_server`, `user_listener`: who comes; `user_connection`: one client; `user_core`, `user_commands`: the protocol; `user_device`:
what is served; `user_memory`: a client's memory) and a client (`user_client`), and devices that the kernel has (`kernel`)."""
