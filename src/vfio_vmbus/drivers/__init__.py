"""VSCs: user-mode drivers over a VMBus device's view. They know channels and shared buffers, never a host."""
