"""The chip as the compiler and the machine see it: a line of places that streams run along.

    West MXM | SXM | MEM 43 … 0 | VXM | MEM 0 … 43 | SXM | East MXM        (position 0 is the VXM)

A value enters a stream at a position and moves one position a cycle, eastward or westward. All
numbers come from the catalogue's record; what nobody published stands in `catalog/data`'s
assumptions (functional delays: `isa`).
"""

from dataclasses import dataclass
from functools import cached_property
from math import ceil
from typing import Final

from tokenworks.catalog.book import Catalog
from tokenworks.errors import UserError

SG: Final = 4  # streams a 32-bit number takes
WEIGHT_STREAMS: Final = 8  # streams that carry one plane's weights
LINK_METADATA_BYTES: Final = 8  # go with each vector (ISCA'22)


@dataclass(frozen=True)
class Chip:
    """One chip's floor plan and rates. Slices 0 … 43 lie in the west, counted from the VXM."""

    name: str
    lanes: int
    tiles: int
    streams: int  # in each direction
    slices: int
    banks: int
    words_per_bank: int
    slices_per_hop: int
    planes: int
    dim: int
    alus: int
    links: int
    link_cycles: int
    link_bytes_per_cycle: float
    install_cycles: int
    clock_hz: float
    power_w: float
    assumed: tuple[str, ...] = ()  # numbers that were published of no such chip

    @property
    def words(self) -> int:
        """Words of a slice."""
        return self.banks * self.words_per_bank

    @property
    def sram_bytes(self) -> int:
        """All of the chip's memory."""
        return self.slices * self.words * self.lanes

    @property
    def superlane(self) -> int:
        """Lanes of one tile."""
        return self.lanes // self.tiles

    @property
    def side(self) -> int:
        """Slices of one hemisphere."""
        return self.slices // 2

    @cached_property
    def edge(self) -> int:
        """Position of the SXM; the MXM and the links lie one further."""
        return ceil(self.side / self.slices_per_hop) + 1

    def place(self, unit: str, index: int) -> int:
        """The position of a unit: below zero in the west."""
        if unit == "MEM":
            east, depth = divmod(index, self.side)
            hop = 1 + depth // self.slices_per_hop
            return hop if east else -hop
        if unit == "SXM":
            return self.edge if index else -self.edge
        if unit == "MXM":
            return self.edge + 1 if index * 2 >= self.planes else -self.edge - 1
        if unit == "C2C":
            return self.edge + 1 if index * 2 >= self.links else -self.edge - 1
        return 0

    @property
    def vector_cycles(self) -> int:
        """Cycles one link is busy with one vector."""
        return ceil((self.lanes + LINK_METADATA_BYTES) / self.link_bytes_per_cycle)

    @property
    def crossing_cycles(self) -> int:
        """Cycles from sending a vector to receiving it at a link's other end."""
        return self.vector_cycles + self.link_cycles

    @property
    def load_cycles(self) -> int:
        """Cycles to bring one plane its weights, all planes loading at once."""
        return self.dim // WEIGHT_STREAMS


# What the floor plan is made of, as the catalogue's `units` calls it.
FLOOR_PLAN: Final = (
    "mem_slices", "mem_banks_per_slice", "lanes", "mem_words_per_bank", "superlanes",
    "streams_per_direction", "mem_slices_per_hop", "mxm_planes", "mxm_dim", "vxm_alus_per_lane",
    "links", "install_cycles",
)  # fmt: skip
_PUBLISHED: Final = "groq-lpu-v1"  # the one chip whose floor plan is known


def chip(catalog: Catalog, name: str = _PUBLISHED) -> Chip:
    """The chip called `name`; UserError where the catalogue lacks a number it needs.

    What nobody published of a later chip is taken from LPU v1, its clock and watts from the
    catalogue's assumptions; `assumed` names all of these.
    """
    record = catalog.processor(name)
    if record.kind != "lpu":
        raise UserError(f"{record.name} is no deterministic processor", f"Try {_PUBLISHED}.")
    known = catalog.processor(_PUBLISHED)
    assumed: list[str] = []

    def number(path: str) -> float:
        found = record.get(path)
        if found is None:
            assumed.append(path)
            found = known.need(path)
        return found.value

    def either(path: str, assumption: str) -> float:
        found = record.get(path)
        if found is None:
            assumed.append(assumption)
            found = catalog.assumed(assumption)
        return found.value

    clock = either("clock_hz", "groq_3_lpu_clock_hz")
    units = {path: round(number(f"units.{path}")) for path in FLOOR_PLAN}
    slices, banks, lanes = units["mem_slices"], units["mem_banks_per_slice"], units["lanes"]
    words = units["mem_words_per_bank"]
    if record.get("units.mem_words_per_bank") is None:
        words = int(number("memory.sram.bytes") // (slices * banks * lanes))
    made = Chip(
        name=record.name,
        lanes=lanes,
        tiles=units["superlanes"],
        streams=units["streams_per_direction"],
        slices=slices,
        banks=banks,
        words_per_bank=words,
        slices_per_hop=units["mem_slices_per_hop"],
        planes=units["mxm_planes"],
        dim=units["mxm_dim"],
        alus=units["vxm_alus_per_lane"],
        links=units["links"],
        link_cycles=round(either("units.link_cycles", "lpu_link_cycles")),
        link_bytes_per_cycle=number("units.link_bytes_per_s") / clock,
        install_cycles=units["install_cycles"],
        clock_hz=clock,
        power_w=either("average_w", "groq_3_lpu_w"),
        assumed=tuple(assumed),
    )
    if made.lanes != made.dim or made.lanes % made.tiles or made.side % SG:
        raise UserError(f"{made.name}: the compiler needs planes as wide as the chip's lanes", "")
    if made.install_cycles < made.load_cycles:
        raise UserError(
            f"{made.name}: units.install_cycles is {made.install_cycles}",
            f"With {WEIGHT_STREAMS} streams a plane it can't be below {made.load_cycles}.",
        )
    return made
