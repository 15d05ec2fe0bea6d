"""Finding devices and choosing who drives them: `pci` (what sysfs shows), `binding` (to vfio-pci and back)."""
