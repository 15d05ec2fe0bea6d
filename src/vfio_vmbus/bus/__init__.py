"""Real devices: finding them, choosing who drives them, and how safe that is. Only the drivers' part (uio*) needs Numba.

machine, kernel_facts       sysfs, procfs and the kernel's log, read without trust
vmbus, pci, inventory       what there is, and how far it reaches; uevents: waiting until that changes
names, inuse, holders       what a user calls a device; what would be lost with it; who has it open
assign                      bind and unbind as a user means them, out of
binding, vmbus_binding        the two buses,
handover, records, persist    what they have in common, what is remembered, what outlasts a reboot
uio, uio_device, uio_channel, appear  a VMBus device over uio_hv_generic
policy                      the one door to unsafe ways
audit, doctor               what is unsafe on this machine; what is missing to drive a device
"""
