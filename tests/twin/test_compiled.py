"""The compiled twin (scripts/compile) answers as the pure one does, to the last bit."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
RUN = """
import hashlib, sys
from random import Random
import msgspec
from msgspec.structs import replace
from tokenworks.catalog.book import catalog
from tokenworks.model import library
from tokenworks.twin import run
from tokenworks.twin.replay import replay
from tokenworks.twin.scenario import CapChange, Chance, PowerRules, parse
from tokenworks.workload import Poisson, generate, named

print(run.__file__.endswith(".py"))
trouble = dict(
    chance=Chance(crash_every_h=0.05, hang_every_h=0.05, slow_every_h=0.05, for_s=20),
    power=PowerRules(None, (CapChange(20, 4000), CapChange(40, None))),
)
for name, workload, rate, changes in (
    ("8xh100", "azure-conversation", 100, {}),
    ("8xh100", "mooncake-conversation", 20, trouble),
    ("8xh100-lpx", "azure-conversation", 25, trouble),
    ("mixed", "azure-conversation", 25, {"chance": trouble["chance"]}),
):
    scenario = parse(open(f"{sys.argv[1]}/{name}.toml", "rb").read(), name)
    scenario = replace(scenario, **changes)
    drawn = replace(named(workload), arrivals=Poisson(rate))
    requests = list(generate(drawn, Random(1), 1500))
    found = replay(scenario, requests, requests[-1].arrival_ns, catalog(), library.shape, 1)
    rows = (list(found.outcomes), found.summary, found.log)
    print(name, *(hashlib.sha256(msgspec.json.encode(each)).hexdigest() for each in rows))
"""


def answers(package: Path) -> list[str]:
    done = subprocess.run(
        [sys.executable, "-c", RUN, str(ROOT / "examples" / "scenarios")],
        env=os.environ | {"PYTHONPATH": str(package)},
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout.splitlines()


@pytest.mark.skipif(not shutil.which(os.environ.get("CC", "cc")), reason="there is no C compiler")
@pytest.mark.timeout(900)
def test_the_compiled_twin_answers_as_the_pure_one(tmp_path: Path) -> None:
    target = tmp_path / "compiled"
    # As fast to compile as can be: how fast it runs is another matter.
    quick = {"MYPYC_OPT_LEVEL": "0", "MYPYC_DEBUG_LEVEL": "0"}
    environment = os.environ | {"PYTHON": sys.executable} | quick
    command = ["sh", str(ROOT / "scripts" / "compile"), str(target), "twin"]
    subprocess.run(command, env=environment, check=True, capture_output=True)
    pure, *expected = answers(ROOT / "src")
    compiled, *found = answers(target)
    assert (pure, compiled) == ("True", "False")
    assert found == expected
