"""A rig that runs QEMU and a Linux guest in it, and the tests that need one. `make test-guest` runs them, `make test` does not."""
