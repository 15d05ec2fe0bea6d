"""VMBus rings: one producer, one consumer, a control page and a data area that is mapped twice in a row.

`state` is what one end keeps to itself, `primitives` the steps that every data-plane kernel is made of, `bursts` kernels over
tables of packets, `ends` the two ends as Python objects, `pair` both rings of a channel as they lie in its GPADL, `reference` the
same in plain Python (the oracle of the tests).
"""
