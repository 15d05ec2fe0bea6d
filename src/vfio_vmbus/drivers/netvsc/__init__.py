"""netvsc, the VSC of a virtual network card: `driver` (handshake, control), `dataplane` (kernels), `state` (what they share)."""
