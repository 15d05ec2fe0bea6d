"""What drivers see: a VMBus device (`device`), its channels and shared buffers; `connection` brings them over a VFIO device."""
