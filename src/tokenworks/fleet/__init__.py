"""From a placement to a replica: its modelled engine, and what a scheduler may know of it. Pure."""
