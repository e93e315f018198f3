"""The limits of one client."""

import msgspec


class Limits(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Bounds that keep one client from harming the others."""

    body_bytes: int = 32 * 1024 * 1024
    header_bytes: int = 64 * 1024
    connections: int = 10_000
    header_s: float = 15.0  # for a request's headers to arrive
    body_s: float = 120.0  # for its body
    idle_s: float = 75.0  # between two requests of a connection
    reader_s: float = 300.0  # for a client that has stopped reading its answer
    queue_s: float = 300.0  # for a request to wait for the engine
    queue: int = 256  # requests that wait

    def __post_init__(self) -> None:
        for name in self.__struct_fields__:
            if getattr(self, name) <= 0:
                raise ValueError(f"limits.{name} must be above zero")
