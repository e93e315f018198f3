"""What an operator can set about batches; one record per setting."""

import msgspec


class BatchSettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`[batches]` of the fleet file."""

    lines: int = 50_000  # of one batch
    line_bytes: int = 8 * 1024 * 1024
    file_bytes: int = 200 * 1024 * 1024
    file_days: float = 30.0  # files are kept for, where their owner has not said it
    window: int = 256  # lines at the scheduler at once, of all batches
    window_bytes: int = 64 * 1024 * 1024  # what their requests may hold of memory
    tries: int = 3  # for a line whose engine fails

    def __post_init__(self) -> None:
        for name in self.__struct_fields__:
            if getattr(self, name) <= 0:
                raise ValueError(f"batches.{name} must be above zero")
