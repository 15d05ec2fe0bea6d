"""A virtual machine over /dev/kvm whose guest finds itself on Hyper-V, with the embedded host's devices on its VMBus. x86-64 only.

`kvm` are the kernel's descriptors; `memory`, `boot`, `acpi` what a guest finds at its start; `serial`, `rtc`, `pci` the few devices
that Linux needs; `cpu` runs a vCPU, `machine` all of it. None of these imports Numba or the data plane: the guest boots while they load.
"""
