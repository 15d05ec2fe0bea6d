"""Real devices: finding them, choosing who drives them, and how safe that is. Nothing here needs Numba.

    machine, kernel_facts       sysfs, procfs and the kernel's log, read without trust
    vmbus, pci, inventory       what there is, and how far it reaches; uevents: waiting until that changes
    names, inuse, holders       what a user calls a device; what would be lost with it; who has it open
    assign                      bind and unbind as a user means them, out of
    binding, vmbus_binding        the two buses,
    handover, records, persist    what they have in common, what is remembered, what outlasts a reboot
    policy                      the one door to unsafe ways
    audit, doctor               what is unsafe on this machine; what is missing to drive a device
"""
