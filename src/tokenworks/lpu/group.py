"""Chips that share each layer: what each of them has, and where their links lead.

Chip c of a group of n has the c-th of n equal shares of the heads (with their key heads), of the
inner numbers and of the vocabulary; each has the whole residual. All chips of a group run the same
schedule in lockstep, and send each other their shares of what must be added up.

Links of the east lead to the others of the group, as many to each; those of the west to the same
chip of the groups before and after. A chip that shares with nobody has all of the east for the next
chip, all of the west for the one before.
"""

from math import ceil

import numpy as np
from msgspec.structs import replace

from tokenworks.errors import UserError
from tokenworks.lpu.chip import SG, Chip
from tokenworks.lpu.graph import Layer, Matrix, Network, Sizes


def share(sizes: Sizes, group: int, lanes: int) -> Sizes:
    """One chip's share as a model of its own; UserError where heads can't be shared evenly.

    Where a chip has fewer key heads than its lanes have room for, queries of one key head lie side
    by side, each beside a copy of the key: it counts as more key heads.
    """
    if group == 1:
        return sizes
    if group < 1:
        raise UserError(f"{group} chips can't share a layer", "Give 1, 2, 3 … for --group.")
    is_even = sizes.kv_heads % group == 0 or group % sizes.kv_heads == 0
    if sizes.heads % group or sizes.inner % group or not is_even:
        raise UserError(
            f"{sizes.heads} heads, {sizes.kv_heads} of them with keys, and {sizes.inner} inner"
            f" numbers can't be shared evenly by {group} chips",
            "Give another --group.",
        )
    heads, own = sizes.heads // group, max(sizes.kv_heads // group, 1)
    copies = next(
        n for n in range(max(lanes // (sizes.head_dim * own), 1), 0, -1) if not heads % (own * n)
    )
    return replace(
        sizes,
        heads=heads,
        kv_heads=own * copies,
        inner=sizes.inner // group,
        vocab=ceil(sizes.vocab / group),
    )


def share_of(network: Network, group: int, rank: int, lanes: int) -> Network:
    """The weights of one chip of a group; scales stay those of the whole matrices."""
    if group == 1:
        return network
    s, own = network.sizes, share(network.sizes, group, lanes)
    numbers = np.arange(s.head_dim)
    heads = rank * own.heads + np.arange(own.heads)
    queries = (heads[:, None] * s.head_dim + numbers).reshape(-1)
    keys = ((heads[:: own.rows] // s.rows)[:, None] * s.head_dim + numbers).reshape(-1)
    inner = slice(rank * own.inner, (rank + 1) * own.inner)

    def layer(each: Layer) -> Layer:
        return Layer(
            each.norm, each.norm2,
            _rows(each.q, queries), _rows(each.k, keys), _rows(each.v, keys),
            Matrix(each.out.values[:, queries], each.out.scale),
            _rows(each.gate, inner), _rows(each.up, inner),
            Matrix(each.down.values[:, inner], each.down.scale),
        )  # fmt: skip

    words = _rows(network.head, slice(rank * own.vocab, (rank + 1) * own.vocab))
    more = own.vocab - len(words.scale)  # of the last, where the words don't come out even
    head = Matrix(np.pad(words.values, ((0, more), (0, 0))), np.pad(words.scale, (0, more)))
    return replace(
        network, sizes=own, layers=tuple(layer(each) for each in network.layers), head=head
    )


def _rows(matrix: Matrix, which: "slice | np.ndarray[tuple[int], np.dtype[np.intp]]") -> Matrix:
    return Matrix(matrix.values[which], matrix.scale[which])


class Cables:
    """Where links lead, for any chip of a group. A vector's four streams go over `width` links at
    once, in `turns` turns; words take turns among the `bundles` of so many links.
    """

    def __init__(self, chip: Chip, group: int) -> None:
        self.group, self.east = group, chip.links // 2
        # Links to the next group are so many behind those from the one before.
        self.onward = self.east if group == 1 else self.east // 2
        if group > 1 and (self.east < group - 1 or self.onward < SG):
            raise UserError(
                f"{chip.links} links can't join {group} chips to one another",
                "Give a smaller --group.",
            )
        self._each = max(self.east // max(group - 1, 1), 1)  # links to each other chip
        self.width = min(SG, 1 << (self._each.bit_length() - 1))
        self.turns = SG // self.width
        self.bundles = self._each // self.width

    def first(self, ahead: int, word: int) -> int:
        """The first link to the chip that is `ahead` (1 …) further on, for one word."""
        return self.east + (ahead - 1) * self._each + word % self.bundles * self.width

    def other(self, rank: int, link: int) -> tuple[int, int] | None:
        """The chip of the same group, and its link, at the other end; None if there is none."""
        place, spare = divmod(link - self.east, self._each)
        if link < self.east or place + 1 >= self.group:
            return None
        back = self.group - 2 - place  # so far ahead, but one, this chip is of the other
        return (rank + place + 1) % self.group, self.east + back * self._each + spare
