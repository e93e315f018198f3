"""A greedy answer from a machine, pass by pass, with exact cycles."""

from collections.abc import Iterator, Sequence

import msgspec

from tokenworks.lpu.machine import Machine


class Said(msgspec.Struct, frozen=True):
    """One pass of a token: the cycles it took, and the token that was said after it, if one was."""

    cycles: int
    token: int | None = None


def answer(machine: Machine, tokens: Sequence[int], most: int, end: int) -> Iterator[Said]:
    """A new conversation: read a prompt and answer with at most `most` tokens, up to `end`.

    First come the passes of the prompt, in which nothing is said but after the last; they leave the
    head out, whose scores nobody would read. `end` isn't said, but its pass is told of, too.
    UserError past the program's longest context.
    """
    machine.reset()
    for token in tokens[:-1]:
        yield Said(machine.step(token, want_scores=False)[1])
    token = tokens[-1]
    for _ in range(most):
        scores, cycles = machine.step(token)
        assert scores is not None
        token = int(scores.argmax())
        if token == end:
            yield Said(cycles)
            return
        yield Said(cycles, token)
