"""The scheduler in virtual time over modelled replicas: any fleet, in seconds."""
