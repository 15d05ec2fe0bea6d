"""Declarations of everything that goes over a wire or lies in shared memory; nothing here acts.

`layout` and `bits` are the means; `vmbus`, `gpa`, `ring`, `nvsp` and `rndis` are the protocols. One field
table per structure gives the class, its size, its offsets and its numpy dtype. Importing any of it loads
neither numpy nor numba.
"""
