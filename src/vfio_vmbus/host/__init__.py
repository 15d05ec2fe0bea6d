"""The embedded VMBus host: connections, VSPs and their data-plane workers, the virtual switch and its ports."""
