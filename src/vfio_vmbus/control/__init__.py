"""A socket by which a running process of this package tells what it does, and is told what to change: `vfio-vmbus status`, `control`.

Nothing of it touches the data path.
"""
