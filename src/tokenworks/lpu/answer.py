"""A greedy answer from a machine, token by token, with exact cycles."""

from collections.abc import Iterator, Sequence

import msgspec

from tokenworks.lpu.machine import Machine


class Said(msgspec.Struct, frozen=True):
    """One token of an answer, and the cycles it took; of the first, those of the prompt's last."""

    token: int
    cycles: int
    read_cycles: int = 0  # with the first token: of the prompt before its last token


def answer(machine: Machine, tokens: Sequence[int], most: int, end: int) -> Iterator[Said]:
    """Read a prompt and answer with at most `most` tokens, up to (and without) `end`.

    Goes on where the machine's conversation is; UserError past the program's longest context.
    """
    read = sum(machine.step(token, want_scores=False)[1] for token in tokens[:-1])
    token = tokens[-1]
    for _ in range(most):
        scores, cycles = machine.step(token)
        assert scores is not None
        token = int(scores.argmax())
        if token == end:
            return
        yield Said(token, cycles, read)
        read = 0
