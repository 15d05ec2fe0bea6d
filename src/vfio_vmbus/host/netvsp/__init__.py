"""netvsp, the VSP behind a virtual network card: `dataplane` (kernels, on the switch's worker), `control` (NVSP and RNDIS control)."""
