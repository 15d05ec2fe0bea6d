"""What a user runs on a driver: `tap` (a network card for the kernel's own stack), `forward`, `capture`, `replay`, `measure`; and `lab`,
namespaces to try them in."""
