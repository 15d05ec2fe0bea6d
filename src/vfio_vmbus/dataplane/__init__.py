"""What both ends of a device protocol need on their data plane: a worker thread, RNDIS packet messages, Internet checksums."""
