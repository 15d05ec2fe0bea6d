"""Kernels that both ends of a device protocol need: RNDIS packet messages, Internet checksums."""
