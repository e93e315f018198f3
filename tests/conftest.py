"""Gateways that several tests share: each is started once."""

from collections.abc import Iterator

import pytest
from hypothesis import settings

from tests.gateway.scripted import ScriptedEngine
from tests.support import Running, gateway

# The same examples in every run, so that a failure is the change's and can be had again;
# `pytest --hypothesis-profile=explore` looks for new ones.
settings.register_profile("repeatable", derandomize=True, deadline=None)
settings.register_profile("explore", deadline=None)
settings.load_profile("repeatable")


@pytest.fixture(scope="session")
def live_gateway(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """A gateway with the real embedded engine and the default model."""
    with gateway(home=tmp_path_factory.mktemp("config")) as running:
        yield running


@pytest.fixture(scope="session")
def scripted_engine() -> Iterator[ScriptedEngine]:
    """An engine that plays what a request's text tells it to."""
    with ScriptedEngine() as engine:
        yield engine


@pytest.fixture(scope="session")
def relay(
    scripted_engine: ScriptedEngine, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Running]:
    """A gateway in front of the scripted engine."""
    home = tmp_path_factory.mktemp("config")
    with gateway("--engine", scripted_engine.url, home=home) as running:
        yield running
