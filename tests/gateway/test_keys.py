"""API keys: what a header opens, until when, and what the file keeps."""

import json
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from tests.support import run
from tokenworks.errors import UserError
from tokenworks.gateway.allowance import Allowance
from tokenworks.gateway.keys import Key, Keys
from tokenworks.gateway.problem import Problem


class Clock:
    """A wall clock that a test sets."""

    def __init__(self) -> None:
        self.time = datetime(2026, 11, 3, 12, tzinfo=UTC)

    def __call__(self) -> datetime:
        return self.time


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def keys(tmp_path: Path, clock: Clock) -> Keys:
    return Keys(tmp_path / "keys.json", clock)


def code(found: Key | Problem | None) -> str | None:
    return found.code if isinstance(found, Problem) else None


def test_a_header_opens_with_its_key_only(keys: Keys) -> None:
    alice, bob = keys.add("alice").encode(), keys.add("bob").encode()
    for _ in range(2):  # compared, then remembered
        for header in (b"Bearer " + alice, b"bearer  " + alice + b" "):
            found = keys.find(header)
            assert isinstance(found, Key)
            assert found.name == "alice"
            assert alice.startswith(f"tw-{found.id}-".encode())
            assert keys.check(header) is None
        found = keys.find(b"Bearer " + bob)
        assert isinstance(found, Key)
        assert found.name == "bob"
        assert code(keys.find(b"")) == "missing_api_key"
        crossed = alice[:16] + bob[16:]
        for wrong in (b"Bearer " + alice[:-1], b"Basic " + alice, b"Bearer " + crossed, b"\xff"):
            assert code(keys.find(wrong)) == code(keys.check(wrong)) == "invalid_api_key"


def test_what_is_remembered_ends_with_the_key(keys: Keys, tmp_path: Path, clock: Clock) -> None:
    header = b"Bearer " + keys.add("alice").encode()
    running = Keys(tmp_path / "keys.json", clock)
    assert isinstance(running.find(header), Key)
    assert isinstance(keys.find(header), Key)
    keys.revoke("alice")
    assert code(keys.find(header)) == "invalid_api_key"
    running.refresh()
    assert code(running.find(header)) == "invalid_api_key"

    header = b"Bearer " + keys.add("bob").encode()
    running.refresh()
    assert isinstance(running.find(header), Key)
    (tmp_path / "keys.json").unlink()
    running.refresh()
    assert code(running.find(header)) == "invalid_api_key"


def test_what_is_remembered_is_bounded(keys: Keys, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tokenworks.gateway.keys._SEEN", 3)
    secret = keys.add("alice").encode()
    for spaces in range(10):
        assert isinstance(keys.find(b"Bearer" + b" " * (spaces + 1) + secret), Key)
        assert len(keys._seen) <= 3


def test_a_key_ends_at_its_time_and_says_so(keys: Keys, clock: Clock) -> None:
    header = b"Bearer " + keys.add("alice", expires=clock.time + timedelta(days=1)).encode()
    clock.time += timedelta(days=1) - timedelta(microseconds=1)
    assert isinstance(keys.find(header), Key)
    clock.time += timedelta(microseconds=1)
    problem = keys.find(header)
    assert isinstance(problem, Problem)
    assert (problem.status, problem.code) == (401, "expired_api_key")
    assert "2026-11-04 12:00 UTC" in problem.message
    wrong = header[:-1] + (b"A" if header[-1:] != b"A" else b"B")
    assert code(keys.find(wrong)) == "invalid_api_key"  # tells nobody else when it ended
    with pytest.raises(UserError, match="has passed"):
        keys.add("bob", expires=clock.time)


def test_admin_routes_take_admin_keys(keys: Keys) -> None:
    alice, root = keys.add("alice").encode(), keys.add("root", is_admin=True).encode()
    assert keys.check_admin(b"Bearer " + root) is None
    problem = keys.check_admin(b"Bearer " + alice)
    assert problem is not None
    assert (problem.status, problem.code) == (403, "admin_key_required")
    assert code(keys.check_admin(b"")) == "missing_api_key"


def test_the_file_keeps_all_of_a_key(keys: Keys, tmp_path: Path, clock: Clock) -> None:
    limits = Allowance(requests_per_minute=60, classes=("realtime",), budget_usd_per_day=1.5)
    keys.add("alice", tenant="acme", expires=clock.time.replace(year=2027), limits=limits)
    keys.add("bob", is_admin=True)
    again = Keys(tmp_path / "keys.json", clock)
    assert again.by_id == keys.by_id
    alice, bob = again.by_id.values()
    assert (alice.tenant, alice.limits, alice.is_admin) == ("acme", limits, False)
    assert (bob.tenant, bob.limits, bob.expires, bob.is_admin) == ("", Allowance(), None, True)


def test_a_file_from_before_there_were_limits_still_opens(tmp_path: Path) -> None:
    file = tmp_path / "keys.json"
    secret = Keys(file).add("alice")
    old = {
        identity: {name: kept[name] for name in ("name", "sha256", "created")}
        for identity, kept in json.loads(file.read_text()).items()
    }
    file.write_text(json.dumps(old))
    found = Keys(file).find(f"Bearer {secret}".encode())
    assert isinstance(found, Key)
    assert found.id == next(iter(old))


@pytest.mark.parametrize(
    "wrong",
    [
        '{"limits": {"requests_per_minute": 0}}',
        '{"limits": {"request_per_minute": 5}}',
        '{"expires": "2027-01-01T00:00:00"}',  # of which time zone?
    ],
)
def test_a_file_that_is_wrong_is_named(wrong: str, tmp_path: Path) -> None:
    kept = {"name": "a", "sha256": "0" * 64, "created": ""} | json.loads(wrong)
    (tmp_path / "keys.json").write_text(json.dumps({"ab": kept}))
    with pytest.raises(UserError, match=r"keys\.json"):
        Keys(tmp_path / "keys.json")


def test_the_command_line_makes_and_shows_limits(tmp_path: Path) -> None:
    here = {"TOKENWORKS_CONFIG": str(tmp_path)}
    flags = (
        *("--tenant", "acme", "--expires", "30d", "--requests-per-minute", "60"),
        *("--tokens-per-day", "100000", "--classes", "realtime,standard", "--models", "a,b"),
        *("--concurrent", "4", "--budget-usd-per-month", "20", "--admin"),
    )
    before = datetime.now(UTC)
    made = run("keys", "add", "alice", *flags, **here)
    assert made.returncode == 0, made.stderr
    (key,) = Keys(tmp_path / "keys.json").by_id.values()
    assert key.expires is not None
    assert timedelta(0) <= key.expires - before - timedelta(days=30) < timedelta(minutes=5)
    assert key.is_admin
    assert key.limits == Allowance(
        requests_per_minute=60,
        tokens_per_day=100_000,
        concurrent=4,
        classes=("realtime", "standard"),
        models=("a", "b"),
        budget_usd_per_month=20,
    )
    listed = " ".join(run("keys", "list", **here).stdout.split())
    for told in ("acme", "60 requests/min", "100,000 tokens/day", "4 at once", "$20.00/month"):
        assert told in listed
    assert "realtime, standard" in listed
    assert key.expires.isoformat(timespec="seconds") in listed
    run("keys", "add", "bob", "--expires", "9999-01-31", **here)
    assert "9999-01-31T00:00:00+00:00" in run("keys", "list", **here).stdout


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (("--expires", "soon"), "--expires 'soon' is no time"),
        (("--expires", "2027-02-30"), "is no time"),
        (("--expires", "999999w"), "is no time"),
        (("--expires", "2001-01-01"), "has passed"),
        (("--classes", "gold"), "gold"),
        (("--classes", ""), "classes is empty"),
        (("--requests-per-minute", "0"), "requests_per_minute is 0"),
        (("--budget-usd-per-day", "nan"), "budget_usd_per_day is nan"),
        (("--tenant", "no good"), "'no good' is no name for a tenant"),
    ],
)
def test_limits_that_are_wrong_are_one_line(
    flags: tuple[str, ...], told: str, tmp_path: Path
) -> None:
    done = run("keys", "add", "alice", *flags, TOKENWORKS_CONFIG=str(tmp_path))
    assert done.returncode == 2
    assert told in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    assert not (tmp_path / "keys.json").exists()
