"""Tokenworks: software that runs, proves and plans AI factories. ARCHITECTURE.md is the map."""

__version__ = "0.1.0"
