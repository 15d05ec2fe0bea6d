"""The demonstration: real traffic through a VMBus network card owned by user space, then attacks on its host that are stopped.

`stage` sets it up, `traffic` is what passes through, `attack` what is tried; `run` tells the story in order.
"""
