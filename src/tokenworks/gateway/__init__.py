"""Driver of the live factory: HTTP in front, engines behind, the relay between them."""
