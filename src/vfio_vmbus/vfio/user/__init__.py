"""vfio-user, both ends, each a core sans-IO in a shell.

A server (`server`, `listener`: who comes; `connection`: one client; `core`, `commands`: the protocol; `device`: what is served; `memory`: a
client's memory) and a client (`client` and what its name begins with that).
"""
