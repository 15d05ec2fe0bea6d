"""Memory with an address: sealed shared memory, private blocks, and the access that kernels have to them.

`shared`, `mapping` and `block` own memory; `access`, `libc` and `kernel` are what compiled code uses on it.
Only the latter three import numba.
"""
