"""Public help for tests, demonstrations and fuzzing: `hostile` attacks a host, `scripted` is a host that says what it is told to."""
