"""The one exception that is meant for a person. Imports nothing."""


class UserError(Exception):
    """Something the user can mend: printed as one readable line, never as a traceback.

    `message` names the place (a file, a line, a key, an address); `remedy` says what to do.
    """

    def __init__(self, message: str, remedy: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.remedy = remedy

    def __str__(self) -> str:
        return f"{self.message}. {self.remedy}" if self.remedy else self.message
