"""The deterministic machine as an engine of the factory, in a process of its own."""
