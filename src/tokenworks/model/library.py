"""The catalogue's models as shapes."""

from functools import cache

from tokenworks.catalog import shapes
from tokenworks.model import config
from tokenworks.model.shape import Shape


@cache
def shape(name: str) -> Shape:
    """The shape of a catalogued model, by name or alias; UserError if there is none."""
    record = shapes.find(name)
    return config.shape(record.config, record.name, record.served)
