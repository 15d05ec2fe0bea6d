"""The command `vfio-vmbus`: arguments and printing. Nothing here is needed to use the package."""
