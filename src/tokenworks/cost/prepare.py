"""From a placement to what can be asked: the work that no batch changes is done once."""

from tokenworks.catalog.book import Catalog, catalog
from tokenworks.cost.analytic import Analytic
from tokenworks.cost.batch import Batch, Cost
from tokenworks.cost.placement import Placement
from tokenworks.cost.roofline import Roofline
from tokenworks.cost.scheduled import Scheduled
from tokenworks.cost.static import Static
from tokenworks.errors import UserError
from tokenworks.model.shape import Shape


def prepare(shape: Shape, placement: Placement, book: Catalog | None = None) -> Roofline | Static:
    """`shape` on `placement`, ready for `step` and `run`; `book` defaults to the packaged facts."""
    known = book or catalog()
    if placement.processor.kind != "lpu":
        return Roofline(shape, placement, known)
    try:
        return Scheduled(shape, placement, known)
    except UserError as error:
        return Analytic(shape, placement, known, error.message)


def step(shape: Shape, placement: Placement, batch: Batch, book: Catalog | None = None) -> Cost:
    """One step, from nothing: for many, `prepare` once. UserError if the batch does not fit."""
    prepared = prepare(shape, placement, book)
    prepared.check_room(batch)
    return prepared.step(batch)
