"""Model files on this machine: fetched, verified, opened. The impure room below the drivers."""
