"""Tests that take minutes run only where they are asked for: `pytest -m slow`."""

import pytest


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if "slow" in str(config.getoption("markexpr")):
        return
    skip = pytest.mark.skip(reason="takes minutes; ask for it with -m slow")
    for item in items:
        if "slow" in item.keywords:
            item.add_marker(skip)
