"""What tests and benchmarks share, and programs for whoever works on this project. Not part of the distribution."""
