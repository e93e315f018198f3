"""Executes a program on real numbers: every value moves as instructions and cycles say.

A schedule that is wrong reads other words, other values, or nothing: then it is refused (`link`).
Cycles are counted while running: the last effect of the last instruction, over all tiles.
"""

import numpy as np
from numpy.typing import NDArray

from tokenworks.errors import UserError
from tokenworks.lpu import image
from tokenworks.lpu.chip import SG
from tokenworks.lpu.graph import rotary
from tokenworks.lpu.group import share
from tokenworks.lpu.link import Linked, Lockstep, Wires
from tokenworks.lpu.numerics import Floats
from tokenworks.lpu.program import Loaded, Program, Spot
from tokenworks.lpu.values import decode
from tokenworks.lpu.words import Memory


class Core:
    """One chip: its memory, and its segments ready to run."""

    def __init__(self, program: Program, index: int, words: dict[str, image.Words]) -> None:
        self.program, self.chip, self.part = program, program.chip, program.parts[index]
        chip = self.chip
        self.sram: NDArray[np.uint8] = np.zeros((chip.slices, chip.words, chip.lanes), np.uint8)
        self.spots = {spot.name: spot for spot in self.part.spots}
        for spot in self.part.fills:
            self.write(spot, words[spot.name])
        self.memory = Memory(chip, self.part, program.map_table(), self.sram)

    def write(self, spot: Spot, words: image.Words) -> None:
        """Put words where a buffer lies."""
        count = words.shape[1]
        self.sram[spot.slice : spot.slice + spot.gang, spot.addr : spot.addr + count] = words

    def floats(self, spot: Spot) -> Floats:
        """fp32 vectors of a buffer."""
        raw = self.sram[spot.slice : spot.slice + SG, spot.addr : spot.addr + spot.n]
        out: Floats = decode(raw, "f32")
        return out


class Machine:
    """All chips of a program and one conversation on them."""

    def __init__(self, loaded: Loaded) -> None:
        self.loaded, self.program = loaded, loaded.program
        self.cores = [
            Core(loaded.program, index, memory) for index, memory in enumerate(loaded.memory)
        ]
        self.position = 0
        self._own = share(self.program.sizes, self.program.group, self.program.chip.lanes)
        self._wires = Wires(self.program.chip, self.program.group)
        self._ready: dict[tuple[int, int, int], Lockstep] = {}

    def reset(self) -> None:
        """Begin a new conversation: nothing needs to be cleared, each token writes its lane."""
        self.position = 0

    def step(self, token: int, *, want_scores: bool = True) -> tuple[Floats | None, int]:
        """One more token: the scores of all words (None if not wanted), and the cycles it took."""
        program, position = self.program, self.position
        s, chip = program.sizes, program.chip
        if not 0 <= token < s.vocab:
            raise UserError(f"there is no token {token}", f"The vocabulary has {s.vocab}.")
        bucket = program.bucket(position)
        blocks = program.parts[0].buckets[bucket].tokens // chip.lanes
        given = image.inputs(chip, self._own, blocks, position, rotary(s, position))
        table = self.loaded.embedding
        x = np.zeros((-(-s.hidden // chip.lanes), chip.lanes), np.float32)
        x.reshape(-1)[: s.hidden] = table.values[token].astype(np.float32) * table.scale[token]
        given["x"] = image.vector_words(x)
        cycles = 0
        for first in range(0, len(self.cores), program.group):
            cores = self.cores[first : first + program.group]
            for core in cores:
                for name, words in given.items():
                    if name in core.spots and (name != "x" or not first):
                        core.write(core.spots[name], words)
            for number, segment in enumerate(cores[0].part.buckets[bucket].segments):
                if segment.name == "head" and not want_scores:
                    continue
                cycles += self._run(first, bucket, number)
                if segment.name == "send":
                    cycles += chip.link_cycles
        self.position += 1
        cycles += chip.tiles  # the last tile is so much behind the first
        if not want_scores:
            return None, cycles
        scores = [
            core.floats(core.spots["out.logits"]).reshape(-1)[: self._own.vocab]
            for core in self.cores[-program.group :]
        ]
        return np.concatenate(scores)[: s.vocab], cycles

    def _run(self, first: int, bucket: int, number: int) -> int:
        """Run a segment of the group whose first chip this is; the cycles to its last effect."""
        key = first, bucket, number
        if key not in self._ready:
            cores = self.cores[first : first + self.program.group]
            self._ready[key] = Lockstep(
                [
                    Linked(core.memory, core.part.buckets[bucket].segments[number], self._wires, i)
                    for i, core in enumerate(cores)
                ],
                self._wires,
            )
        return self._ready[key].run()
