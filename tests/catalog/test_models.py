"""Every fact of the catalogue has its source."""

import pytest

from tokenworks.catalog.models import DEFAULT, model, models
from tokenworks.errors import UserError


def test_every_model_has_sources_and_can_be_verified() -> None:
    assert DEFAULT in models()
    for name, facts in models().items():
        assert facts.name == name
        assert facts.source
        assert facts.file.source
        assert len(facts.file.sha256) == 64
        assert facts.file.member.endswith(".gguf")


def test_an_unknown_name_is_told_with_the_known_ones() -> None:
    with pytest.raises(UserError, match="no model 'nope'") as caught:
        model("nope")
    assert DEFAULT in str(caught.value)
