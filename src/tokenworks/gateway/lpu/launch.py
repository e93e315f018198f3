"""What the machine's process is told."""

import msgspec


class LpuLaunch(msgspec.Struct, frozen=True):
    """A compiled program, what clients call its model, and where to listen."""

    program_path: str
    model_name: str
    socket_path: str
