"""`python -m vfio_vmbus` is `vfio-vmbus`."""

from .cli.main import main

main()
