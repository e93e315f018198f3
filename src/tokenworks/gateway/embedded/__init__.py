"""The engine in the box: llama.cpp in a process of its own, planned, started and looked after."""
