"""The balloon driver: memory that the host asks for, given from what this process owns."""
