"""Modelled replicas in virtual time: what executes steps. Pure; time is an argument."""
