"""The stages of an exchange as a table."""

from enum import Enum


class Stage(Enum):
    """Where an exchange is. The table below says what may follow what."""

    RECEIVING = "receiving"  # the client's request is still coming
    WAITING = "waiting"  # for an engine: the first, or another one after the first was lost
    SENT = "sent"  # an engine has the request
    STREAMING = "streaming"  # and the client has the beginning of its answer (until it is moved)
    DONE = "done"

    after: "tuple[Stage, ...]"  # what may follow; compared by identity, which costs nothing


Stage.RECEIVING.after = (Stage.WAITING, Stage.DONE)
Stage.WAITING.after = (Stage.SENT, Stage.DONE)
Stage.SENT.after = (Stage.STREAMING, Stage.WAITING, Stage.DONE)
Stage.STREAMING.after = (Stage.SENT, Stage.WAITING, Stage.DONE)
Stage.DONE.after = ()
