"""What a user runs on a driver: the demo, the TAP bridge, forwarding, capture, replay, measurement."""
