"""The models the factory can fetch: where their files come from and how to know them again."""

from functools import cache
from typing import Final, Literal

import msgspec

from tokenworks.catalog import packaged
from tokenworks.errors import UserError

DEFAULT: Final = "smollm2-135m-instruct"


class ModelFile(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A model's weights as a member of a package in a registry."""

    package: str
    version: str
    wheel_bytes: int
    member: str
    bytes: int
    sha256: str
    source: str


class Model(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One model, with the grade and source of its facts."""

    title: str
    license: str
    architecture: str
    parameters: int
    context_tokens: int
    source: str
    grade: Literal["datasheet", "measured", "secondary", "derived", "assumed"]
    file: ModelFile
    name: str = ""


@cache
def models() -> dict[str, Model]:
    """Every model of the catalogue, by name."""
    return packaged.records("models", Model)


def model(name: str) -> Model:
    """The model called `name`; UserError with the names there are if there is none."""
    found = models().get(name)
    if found is None:
        raise UserError(
            f"no model {name!r} in the catalogue",
            f"It has: {', '.join(models())}. For any other model give the path of a .gguf file.",
        )
    return found
