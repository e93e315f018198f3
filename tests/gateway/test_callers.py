"""Callers with keys: what each may see and use, also after a restart; and each clear no."""

import json
import sqlite3
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from tests.gateway.scripted import ScriptedEngine
from tests.support import Answer, Running, exchange, gateway, run, wait_for
from tokenworks.gateway.allowance import Allowance, Used
from tokenworks.gateway.keys import Keys
from tokenworks.gateway.ledger import table
from tokenworks.gateway.ledger.row import Row
from tokenworks.gateway.ledger.usage import used_by_day
from tokenworks.units import NS_PER_S

HELLO = {"model": "scripted", "messages": [{"role": "user", "content": "good"}]}


def get(running: Running, path: str, key: str) -> Answer:
    head = f"GET {path} HTTP/1.1\r\nhost: h\r\nauthorization: Bearer {key}\r\n\r\n"
    return exchange(running.address, head.encode())


def post(running: Running, key: str, path: str = "/v1/chat/completions", **more: Any) -> Answer:
    document = {**HELLO, **more} if path.endswith("completions") else more
    return running.post(document, path, authorization=f"Bearer {key}")


def fleet(folder: Path, engine: ScriptedEngine, more: str = "") -> Path:
    """A fleet file whose engine costs a dollar a second."""
    file = folder / "fleet.toml"
    file.write_text(
        f'require_key = true\n[[pools]]\nname = "one"\nmodel = "scripted"\n'
        f'urls = ["{engine.url}"]\nusd_per_h = 3600\n{more}'
    )
    return file


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    home = tmp_path_factory.mktemp("callers")
    made = Keys(home / "keys.json")
    found = {
        "home": str(home),
        "ann": made.add("ann", tenant="acme"),
        "bob": made.add("bob"),
        "root": made.add("root", is_admin=True),
        "poor": made.add("poor", limits=Allowance(budget_usd_per_day=1e-6)),
        "few": made.add("few", limits=Allowance(requests_per_day=2)),
        "old": made.add("old"),
    }
    file = home / "keys.json"
    kept = json.loads(file.read_text())
    for key in kept.values():
        if key["name"] == "old":
            key["expires"] = (datetime.now(UTC) - timedelta(hours=1)).isoformat()
    file.write_text(json.dumps(kept))
    return found


@pytest.fixture(scope="module")
def callers(
    keys: dict[str, str],
    scripted_engine: ScriptedEngine,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Running]:
    file = fleet(tmp_path_factory.mktemp("fleet"), scripted_engine)
    with gateway("--fleet", str(file), home=Path(keys["home"])) as running:
        yield running


def test_receipts_are_their_tenants_and_the_admins(callers: Running, keys: dict[str, str]) -> None:
    identity = post(callers, keys["ann"]).headers["x-request-id"]
    path = f"/v1/receipts/{identity}"
    own, admins = get(callers, path, keys["ann"]), get(callers, path, keys["root"])
    assert own.status == admins.status == 200
    assert own.json == admins.json
    assert own.json["usd"] > 0
    others, absent = get(callers, path, keys["bob"]), get(callers, "/v1/receipts/no", keys["bob"])
    assert others.status == absent.status == 404
    assert others.error["code"] == absent.error["code"] == "receipt_not_found"
    assert others.error["message"].replace(identity, "no") == absent.error["message"]


def test_usage_is_of_ones_own_tenant_and_all_of_it_for_the_admin(
    callers: Running, keys: dict[str, str]
) -> None:
    for name in ("ann", "bob", "bob"):
        assert post(callers, keys[name]).status == 200

    def tenants(name: str) -> dict[str, int]:
        rows = get(callers, "/v1/usage?by=tenant", keys[name]).json["data"]
        return {row["tenant"]: row["finished"] for row in rows}

    wait_for(lambda: tenants("root").get("bob", 0) >= 2, 10)
    assert {"acme", "bob"} <= set(tenants("root"))
    assert set(tenants("ann")) == {"acme"}
    assert tenants("bob") == {"bob": 2}
    wrong = get(callers, "/v1/usage?by=mood", keys["ann"])
    assert (wrong.status, wrong.error["code"]) == (400, "invalid_value")
    assert "mood" in wrong.error["message"]


def test_only_an_admin_operates(callers: Running, keys: dict[str, str]) -> None:
    for path in ("/admin/state", "/admin/cap"):
        assert get(callers, path, keys["root"]).status == 200
        refused = get(callers, path, keys["ann"])
        assert (refused.status, refused.error["code"]) == (403, "admin_key_required")
    for path, body in (("/admin/cap", {"cap_w": 5}), ("/admin/reload", {})):
        refused = post(callers, keys["ann"], path, **body)
        assert (refused.status, refused.error["code"]) == (403, "admin_key_required")
    shown = run("top", "--url", callers.url, TOKENWORKS_API_KEY=keys["ann"])
    assert shown.returncode == 2
    assert "Set TOKENWORKS_API_KEY to a key made with" in shown.stderr
    shown = run("top", "--url", callers.url, "--key-env", "MINE", MINE=keys["root"])
    assert shown.returncode == 0
    assert "one-0" in shown.stdout
    assert keys["root"] not in shown.stdout


def test_an_expired_key_and_a_model_nobody_serves(callers: Running, keys: dict[str, str]) -> None:
    expired = post(callers, keys["old"])
    assert (expired.status, expired.error["code"]) == (401, "expired_api_key")
    assert "expired at" in expired.error["message"]
    absent = post(callers, keys["ann"], model="gpt-9")
    assert (absent.status, absent.error["code"]) == (404, "model_not_found")
    assert "There is: scripted" in absent.error["message"]
    assert absent.error["param"] == "model"


def test_a_budget_and_a_days_requests_outlast_a_restart(
    keys: dict[str, str], scripted_engine: ScriptedEngine, tmp_path: Path
) -> None:
    tenants = "[tenants.acme]\nrequests_per_day = 3\n"
    file = fleet(tmp_path, scripted_engine, tenants)
    start: Any = {"home": Path(keys["home"]), "TOKENWORKS_STATE": str(tmp_path / "state")}
    more = '[ledger]\nfolder = "{}"\n'.format(tmp_path / "ledger")
    file.write_text(file.read_text() + more)
    with gateway("--fleet", str(file), **start) as running:
        assert post(running, keys["poor"]).status == 200
        for _ in range(2):
            assert post(running, keys["ann"]).status == 200
        assert post(running, keys["few"]).status == 200
    with gateway("--fleet", str(file), **start) as running:
        spent = post(running, keys["poor"])
        assert (spent.status, spent.error["code"]) == (429, "insufficient_quota")
        assert int(spent.headers["retry-after"]) > 0
        for name in ("ann", "few"):
            assert post(running, keys[name]).status == 200
        for name in ("ann", "few"):
            over = post(running, keys[name])
            assert (over.status, over.error["code"]) == (429, "rate_limit_exceeded")
            assert "per day" in over.error["message"]
        assert post(running, keys["bob"]).status == 200


def test_a_request_the_scheduler_refuses_costs_no_tokens(
    keys: dict[str, str], scripted_engine: ScriptedEngine, tmp_path: Path
) -> None:
    more = "[tenants.acme]\ntokens_per_day = 500\n[classes.realtime]\nttft_ms = 0.001\n"
    file = fleet(tmp_path, scripted_engine, more)
    with gateway("--fleet", str(file), home=Path(keys["home"])) as running:
        fast: dict[str, Any] = {"service_tier": "priority", "max_tokens": 200}
        for _ in range(5):
            refused = post(running, keys["ann"], **fast)
            assert (refused.status, refused.error["code"]) == (429, "ttft_bound")
        assert post(running, keys["ann"], max_tokens=200).status == 200


def test_what_was_used_on_a_day_is_what_limits_count() -> None:
    connection = sqlite3.connect(":memory:")
    table.create(connection)
    day_ns = 86_400 * NS_PER_S
    rows = [
        Row("a", 5 * day_ns, "acme", "k", prompt_tokens=10, output_tokens=2, usd=1.0, energy_j=3.0),
        Row("b", 6 * day_ns - 1, "acme", "k", outcome="cancelled", prompt_tokens=7, usd=0.5),
        Row("c", 5 * day_ns, "acme", "k", outcome="rejected", prompt_tokens=99, status=429),
        Row("d", 5 * day_ns, "acme", "k", prompt_tokens=50, usd=2.0, energy_j=1.0, batch="batch_1"),
        Row("e", 6 * day_ns, "acme", "k", prompt_tokens=1),
        Row("f", 4 * day_ns, "acme", "k", prompt_tokens=1),
    ]
    table.insert(connection, rows)
    found = [Used(**one) for one in used_by_day(connection, 5 * day_ns)]
    assert found == [Used("acme", "k", 5, 2, 19, 3.5, 4.0), Used("acme", "k", 6, 1, 1)]


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("[[pools]\n", "line 1"),
        ('[[pools]]\nmodel = "m"\n', "urls is missing"),
        ('[[pools]]\nmodel = "m"\nurls = ["http://h"]\nrole = "boss"\n', "role"),
        ('[[pools]]\nmodel = "m"\nurls = ["http://h"]\ntemperature = 1\n', "temperature"),
        ("[classes.flex]\nwait_s = 0\n", "classes.flex.wait_s is 0"),
        ("[classes.express]\n", "classes.express is no service class"),
        (
            '[[pools]]\nmodel = "m"\nurls = ["http://h"]\nkey_env = "NO_SUCH"\n',
            "NO_SUCH is not set",
        ),
        ('[[pools]]\nkind = "emulated"\nmodel = "llama-3.1-8b"\nprocessor = "h10"\n', "h100"),
    ],
)
def test_a_wrong_fleet_file_is_one_line(tmp_path: Path, text: str, told: str) -> None:
    file = tmp_path / "fleet.toml"
    file.write_text(text)
    done = run("up", "--port", "0", "--fleet", str(file), TOKENWORKS_STATE=str(tmp_path / "s"))
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert str(file) in line
    assert told in line


def test_no_engine_at_start_is_one_line_and_some_are_a_warning(
    scripted_engine: ScriptedEngine, tmp_path: Path
) -> None:
    file = tmp_path / "fleet.toml"
    absent = '[[pools]]\nname = "b"\nmodel = "other"\nurls = ["http://127.0.0.1:1"]\n'
    file.write_text(absent)
    done = run("up", "--port", "0", "--fleet", str(file), TOKENWORKS_STATE=str(tmp_path / "s"))
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert "no engine answers at http://127.0.0.1:1" in line
    here = f'[[pools]]\nname = "a"\nmodel = "scripted"\nurls = ["{scripted_engine.url}"]\n'
    file.write_text(here + absent)
    with gateway("--fleet", str(file)) as running:
        assert any("b-0 at http://127.0.0.1:1" in line for line in running.log)
        assert running.post(HELLO).status == 200
        refused = running.post({**HELLO, "model": "other", "service_tier": "priority"})
        assert refused.status in (429, 503)
        assert refused.error["code"] in ("no_room", "no_replica", "ttft_bound")
