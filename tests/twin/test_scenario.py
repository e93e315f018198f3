"""What can't be in a scenario is one line with the file, the key and the remedy."""

import pytest

from tests.twin.stage import BOOK
from tokenworks.errors import UserError
from tokenworks.model import library
from tokenworks.twin.fleet import fleet
from tokenworks.twin.scenario import Scenario, parse

POOL = '[[pools]]\nprocessor = "h100"\n'
HEAD = 'model = "llama-3.1-8b"\n'
GOOD = HEAD + POOL

# What is written, what the message must name, and what the remedy must.
WRONG: dict[str, tuple[str, str, str]] = {
    "no toml": ("model = \n", "TOML", "line"),
    "twice the same key": (HEAD + HEAD + POOL, "TOML", "line"),
    "nothing": ("", "model", "docs/twin.md"),
    "no pools": (HEAD, "pools", "docs/twin.md"),
    "empty pools": (HEAD + "pools = []\n", "pools", "[[pools]]"),
    "a key that isn't there": (GOOD + "colour = 1\n", "colour", "docs/twin.md"),
    "one in a table": (GOOD + "[policy]\nroot = 'energy'\n", "root", "docs/twin.md"),
    "one in a list's table": (GOOD + "[pools.limits]\nseqs = 3\n", "seqs", "docs/twin.md"),
    "a text for a number": (GOOD + "replicas = '3'\n", "replicas", "docs/twin.md"),
    "a route that isn't there": (GOOD + "[policy]\nroute = 'best'\n", "best", "docs/twin.md"),
    "no such class": (GOOD + "[classes.gold]\nttft_ms = 3\n", "classes.gold", "realtime"),
    "no such class in the mix": (
        GOOD + "[[mix]]\nshare = 1.0\nservice_class = 'realtim'\n", "realtim", "realtime",
    ),
    "shares that are not one": (GOOD + "[[mix]]\nshare = 0.5\n", "0.5", "sum to 1"),
    "a share above one": (GOOD + "[[mix]]\nshare = 1.5\n", "mix", "docs/twin.md"),
    "no replicas": (GOOD + "replicas = 0\n", "pools[0].replicas", "1 to"),
    "two pools of a name": (GOOD + POOL, "pools[1].name", "own"),
    "two second processors": (
        GOOD + "decode_on = 'groq-3-lpu'\nffn_on = 'groq-3-lpu'\n", "pools[0]", "one",
    ),
    "too few step tokens": (
        GOOD + "[pools.limits]\nstep_tokens = 5\n", "pools[0].limits.step_tokens", "sequences",
    ),
    "no sequences": (
        GOOD + "[pools.limits]\nsequences = 0\n", "pools[0].limits.sequences", "above",
    ),
    "realtime looser than standard": (
        GOOD + "[classes.realtime]\nttft_ms = 900\n[classes.standard]\nttft_ms = 800\n",
        "classes.realtime.ttft_ms", "tighter",
    ),
    "a bound of nothing": (GOOD + "[classes.flex]\ntpot_ms = 0\n", "classes.flex.tpot_ms", "above"),
    "a bound that is no number": (
        GOOD + "[classes.flex]\ntpot_ms = nan\n", "classes.flex.tpot_ms", "above",
    ),
    "a promise that is sure": (
        GOOD + "[policy]\nconfidence = 1.0\n", "policy.confidence", "between 0 and 1",
    ),
    "nobody outstanding": (GOOD + "[policy]\noutstanding = 0\n", "policy.outstanding", "above"),
    "at once suspect": (GOOD + "[policy]\nsuspect_s = 0\n", "policy.suspect_s", "above"),
    "no weight": (GOOD + "[tenants.a]\nweight = 0\n", "tenants.a.weight", "above"),
    "no watts": (GOOD + "[power]\ncap_w = 0\n", "power.cap_w", "above"),
    "a cap before the beginning": (
        GOOD + "[[power.changes]]\nat_s = -1\ncap_w = 5\n", "power.changes[0]", "0 s",
    ),
    "a fault of nobody": (
        GOOD + "[[faults]]\nreplica = 'gpu-7'\nat_s = 1\nkind = 'hang'\n", "faults[0].replica",
        "h100-0",
    ),
    "a fault of no kind": (
        GOOD + "[[faults]]\nreplica = 'h100-0'\nat_s = 1\nkind = 'fire'\n", "fire", "docs/twin.md",
    ),
    "a slow-down that speeds up": (
        GOOD + "[[faults]]\nreplica = 'h100-0'\nat_s = 1\nkind = 'slow'\nfactor = 0.5\n",
        "faults[0].factor", "at least 1",
    ),
    "chance of never": (GOOD + "[chance]\ncrash_every_h = 0\n", "chance.crash_every_h", "above"),
    "chance backwards": (
        GOOD + "[chance]\ncrash_every_h = 1.0\nfor_s = -5\n", "chance.for_s", "0",
    ),
    "chance that speeds up": (
        GOOD + "[chance]\nslow_every_h = 1.0\nfactor = 0.0\n", "chance.factor", "1",
    ),
    "a price of nobody": (
        GOOD + "[[prices]]\npool = 'h200'\nat_s = 1\nusd_per_h = 1\n", "prices[0].pool", "h100",
    ),
    "a price below nothing": (
        GOOD + "[[prices]]\npool = 'h100'\nat_s = 1\nusd_per_h = -1\n", "prices[0]", "from 0 on",
    ),
    "more at least than there are": (
        GOOD + "[pools.scale]\nleast = 2\n", "pools[0].scale.least", "Raise replicas",
    ),
    "fewer than none": (GOOD + "[pools.scale]\nleast = -1\n", "scale.least", "0 or above"),
    "full at nothing": (
        GOOD + "[pools.scale]\nfull_fraction = 0\n", "scale.full_fraction", "between",
    ),
    "wrong by more than all": (
        "prompt_error_fraction = 1.0\n" + GOOD, "prompt_error_fraction", "below 1",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_what_is_wrong_in_the_file(case: str) -> None:
    text, named, remedy = WRONG[case]
    with pytest.raises(UserError) as raised:
        parse(text.encode(), "fleets/mine.toml")
    assert raised.value.message.startswith("fleets/mine.toml")
    assert named in raised.value.message
    assert remedy in raised.value.remedy
    assert "\n" not in str(raised.value)


def test_bytes_that_are_no_text() -> None:
    with pytest.raises(UserError, match=r"^fleets/mine.toml .*text"):
        parse(b"model = '\xff\xfe'\n", "fleets/mine.toml")


def build(text: str) -> int:
    return len(fleet(parse(text.encode(), "mine.toml"), BOOK, library.shape))


# What only shows when the fleet is built: the pool is named.
UNBUILT: dict[str, tuple[str, str, str]] = {
    "a processor that isn't there": ("processor = 'h10'\n", "h10", "h100"),
    "a model too large": ("processor = 'l40s'\ndevices = 1\n", "", ""),
    "a second processor that isn't there": (
        "processor = 'h100'\ndecode_on = 'groq-3-lp'\n", "groq-3-lp", "groq-3-lpu",
    ),
    "a precision that isn't there": ("processor = 'h100'\nprecision = 'fp3'\n", "fp3", ""),
    "more cuts than devices": ("processor = 'h100'\ndevices = 2\ntp = 4\n", "", ""),
    "no devices": ("processor = 'h100'\ndevices = 0\n", "", ""),
}  # fmt: skip


@pytest.mark.parametrize("case", UNBUILT)
def test_what_cannot_be_built(case: str) -> None:
    text, named, remedy = UNBUILT[case]
    with pytest.raises(UserError) as raised:
        build("model = 'llama-3.1-70b'\n" + POOL + "devices = 4\n[[pools]]\nname = 'two'\n" + text)
    assert raised.value.message.startswith("pools[1]: ")
    assert named in raised.value.message
    assert remedy in raised.value.remedy
    assert raised.value.remedy


def test_a_model_that_is_not_there() -> None:
    with pytest.raises(UserError) as raised:
        build("model = 'llama-3.1-8'\n" + POOL)
    assert "llama-3.1-8b" in str(raised.value)


def test_what_is_left_out_is_as_the_page_says() -> None:
    found = parse(GOOD.encode(), "mine.toml")
    assert isinstance(found, Scenario)
    assert found.pools[0].name == "h100"
    assert found.replica_names() == ["h100-0"]
    assert found.rules.classes["realtime"].ttft_ms == 500
    assert found.rules.scale == {}
    assert build(GOOD + "replicas = 3\n[pools.scale]\nleast = 2\n") == 3
