"""The stages of an exchange as a table."""

from enum import Enum


class Stage(Enum):
    """Where an exchange is. The table below says what may follow what."""

    RECEIVING = "receiving"  # the client's request is still coming
    WAITING = "waiting"  # for a slot, or for the engine to come back
    SENT = "sent"  # the engine has the request, and has said nothing yet
    ANSWERING = "answering"  # the engine's answer is coming
    STREAMING = "streaming"  # and the client has the beginning of it
    DONE = "done"

    after: "tuple[Stage, ...]"  # what may follow; compared by identity, which costs nothing


Stage.RECEIVING.after = (Stage.WAITING, Stage.DONE)
Stage.WAITING.after = (Stage.SENT, Stage.DONE)
Stage.SENT.after = (Stage.ANSWERING, Stage.DONE)
Stage.ANSWERING.after = (Stage.STREAMING, Stage.DONE)
Stage.STREAMING.after = (Stage.DONE,)
Stage.DONE.after = ()
