"""The virtual switch: it learns addresses, floods what it does not know, and counts, in kernels that run without the GIL.

`state` is what kernels and Python share, `fdb` the table of learned addresses; `tap`, `traffic` (generator and sink), `replay`
and `capture` are kinds of ports, `ports` chooses between them, `forwarding` is the switch itself: all of these are kernels.
`switch` is the Python side, with `port`, `template`, `recording` and `capture_file`.
"""
