"""VMBus devices in user space through the VFIO API, isolated, with an embedded VMBus host."""

__version__ = "0.1.0"
