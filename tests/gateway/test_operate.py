"""A gateway changed while it runs: the fleet file read again, power, engines turned on and off."""

import json
import os
import re
import signal
import socket
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.gateway.scripted import HEAD, TAIL, Play, ScriptedEngine, event, framed, scene
from tests.support import Answer, Client, Running, exchange, gateway, request_bytes, wait_for
from tokenworks.gateway.settings import Settings, load

GO_ON = threading.Event()


@scene
async def until_told(play: Play) -> None:
    """A word, and the rest when the test says so."""
    await play.send(HEAD, framed(event("one")))
    while not GO_ON.is_set():
        await play.send(framed(event(" more")), pause_s=0.02)
    await play.send(framed(event(" end")), framed(TAIL), b"0\r\n\r\n")


@pytest.fixture
def others() -> Iterator[list[ScriptedEngine]]:
    """Two engines."""
    with ScriptedEngine() as one, ScriptedEngine() as two:
        yield [one, two]


def ask(scene_: str, **fields: Any) -> dict[str, Any]:
    return {"model": "scripted", "messages": [{"role": "user", "content": scene_}], **fields}


def pool(name: str, *urls: str, more: str = "") -> str:
    return f'[[pools]]\nname = "{name}"\nmodel = "scripted"\nurls = {list(urls)}\n{more}\n'


def get(running: Running, path: str, **headers: str) -> Answer:
    lines = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
    request = f"GET {path} HTTP/1.1\r\nhost: localhost\r\n{lines}\r\n"
    return exchange(running.address, request.encode())


def state(running: Running) -> Any:
    return get(running, "/admin/state").json


def engines(running: Running) -> dict[str, str]:
    return {engine["name"]: engine["state"] for engine in state(running)["engines"]}


def reload(running: Running) -> str:
    answer = running.post({}, "/admin/reload")
    assert answer.status == 200, answer.body
    told: str = answer.json["reloaded"]
    return told


def test_a_pool_goes_while_it_streams_and_another_comes(
    others: list[ScriptedEngine], tmp_path: Path
) -> None:
    first, second = others
    file = tmp_path / "fleet.toml"
    file.write_text(pool("old", first.url))
    GO_ON.clear()
    with gateway("--fleet", str(file)) as running, Client(running.address) as client:
        client.send(request_bytes(ask("until_told", stream=True)))
        head = client.head()
        chunks = client.chunks()
        began = next(chunks)
        file.write_text(pool("new", second.url))
        assert reload(running).startswith("1 replicas added, 1 draining, 0 kept")
        assert engines(running) == {"old-0": "draining", "new-0": "ready"}
        for _ in range(3):
            assert running.post(ask("good")).status == 200
        assert (len(first.seen), len(second.seen)) == (1, 3)
        GO_ON.set()
        head.body = began + b"".join(chunks)
        assert head.text.startswith("one more")
        assert head.text.endswith(" end")
        assert head.events[-1] == "[DONE]"
        wait_for(lambda: engines(running) == {"new-0": "ready"}, 10)
        assert state(running)["requests"] == {"finished": 4}
        # Back again: another replica to the factory, under a name that nobody had.
        file.write_text(pool("old", first.url) + pool("new", second.url))
        assert reload(running).startswith("1 replicas added, 0 draining, 1 kept")
        assert engines(running) == {"old-1": "ready", "new-0": "ready"}


def test_a_pool_that_changes_is_another_one_at_the_same_address(
    others: list[ScriptedEngine], tmp_path: Path
) -> None:
    file = tmp_path / "fleet.toml"
    file.write_text(pool("one", others[0].url))
    with gateway("--fleet", str(file)) as running:
        file.write_text(pool("one", others[0].url, more="slots = 3"))
        assert reload(running).startswith("1 replicas added, 1 draining, 0 kept")
        wait_for(lambda: engines(running) == {"one-1": "ready"}, 10)
        (engine,) = state(running)["engines"]
        assert engine["slots"] == 3
        assert running.post(ask("good")).status == 200
        assert reload(running).startswith("0 replicas added, 0 draining, 1 kept")


def test_classes_limits_weights_and_power_change_on_sighup(
    others: list[ScriptedEngine], tmp_path: Path
) -> None:
    file, events = tmp_path / "fleet.toml", tmp_path / "events.jsonl"
    file.write_text(pool("one", others[0].url))
    fast = {"service_tier": "priority", "stream": True}
    with gateway("--fleet", str(file), "--events", str(events)) as running:
        assert running.post(ask("good", **fast)).status == 200
        file.write_text(
            "drain_s = 5\n" + pool("one", others[0].url) + "[classes.realtime]\nttft_ms = 0.001\n"
            "[tenants.default]\nrequests_per_minute = 2\n[tenants.acme]\nweight = 7.5\n"
            "[power]\ncap_w = 1234\n"
        )
        running.process.send_signal(signal.SIGHUP)
        wait_for(lambda: any("was read again" in line for line in running.log), 10)
        refused = running.post(ask("good", **fast))
        assert (refused.status, refused.error["code"]) == (429, "ttft_bound")
        assert running.post(ask("good")).status == 200
        limited = running.post(ask("good"))
        assert (limited.status, limited.error["code"]) == (429, "rate_limit_exceeded")
        assert get(running, "/admin/cap").json["cap_w"] == 1234
        (told,) = [line for line in running.log if "was read again" in line]
        assert str(file) in told
        assert told.endswith("as before until a restart: drain_s")
    assert '"weight":7.5' in events.read_text()


def test_a_cap_set_by_hand_stays_until_the_files_changes(
    others: list[ScriptedEngine], tmp_path: Path
) -> None:
    file = tmp_path / "fleet.toml"
    file.write_text(pool("one", others[0].url) + "[power]\ncap_w = 900\n")
    with gateway("--fleet", str(file)) as running:
        assert get(running, "/admin/cap").json["cap_w"] == 900
        assert running.post({"cap_w": 500}, "/admin/cap").json["cap_w"] == 500
        assert "the power cap stays as set by hand (500 W)" in reload(running)
        assert get(running, "/admin/cap").json["cap_w"] == 500
        file.write_text(pool("one", others[0].url) + "[power]\ncap_w = 700\n")
        assert "by hand" not in reload(running)
        assert get(running, "/admin/cap").json["cap_w"] == 700
        for wrong in ({"cap_w": 0}, {"cap_w": "much"}, {}, b"{"):
            refused = running.post(wrong, "/admin/cap")
            assert (refused.status, refused.error["param"]) == (400, "cap_w")
        assert running.post({"cap_w": None}, "/admin/cap").json["cap_w"] is None


TWO = 'meter = {kind = "rapl", devices = [0]}\n'
BROKEN = [
    ("[[pools]\n", "line 1"),
    ("{good}frobnicate = 1\n", "frobnicate"),
    ("{good}[classes.realtime]\nttft_ms = 5000\n[classes.standard]\nttft_ms = 9\n", "classes.real"),
    ("{good}[classes.express]\n", "classes.express is no service class"),
    (
        "{good}[tenants.a]\nweight = -1\n",
        "weight is -1.0: it must be above zero - at `$.tenants.a`",
    ),
    ("{good}[classes.flex]\nttft = 1\n", "unknown field `ttft` - at `$.classes.flex`"),
    ("{good}[power]\ncap_w = -3\n", "power.cap_w"),
    ('{good}[policy]\nroute = "round-robin"\n', "policy.route"),
    ('{good}[[pools]]\nname = "b"\nmodel = "m"\nurls = ["ftp://x"]\n', "pools.b: the engine's URL"),
    ('{good}[[pools]]\nname = "b"\nmodel = "m"\nurls = ["{url}"]\n', "pools.b: {url} is in one"),
    (
        '{good}[[pools]]\nname = "b"\nmodel = "m"\nurls = ["http://h"]\nkey_env = "NO_SUCH_KEY"\n',
        "pools.b: key_env: NO_SUCH_KEY is not set",
    ),
    ('{good}[[pools]]\nkind = "embedded"\nmodel = "smollm2-135m-instruct"\n', "pools.embedded"),
    (
        '{good}[[pools]]\nkind = "emulated"\nmodel = "llama-3.1-8b"\nprocessor = "h100"\n',
        "pools.emulated is started by the gateway",
    ),
    (
        '{good}[[pools]]\nmodel = "m"\nurls = ["http://h"]\nmeter = {{kind = "nvml"}}\n',
        "meter nvml needs devices",
    ),
    (
        '{good}[[pools]]\nname = "b"\nmodel = "m"\nurls = ["http://h", "http://i"]\n{two}',
        "pool b: its meter can't tell 2 replicas apart",
    ),
    ("", ""),  # no file at all
]


def test_a_broken_file_changes_nothing_and_says_why(
    others: list[ScriptedEngine], tmp_path: Path
) -> None:
    file = tmp_path / "fleet.toml"
    good = pool("one", others[0].url)
    file.write_text(good)
    with gateway("--fleet", str(file)) as running:
        before = {**state(running), "up_s": 0, "power": 0}
        for text, told in BROKEN:
            broken = text.format(good="drain_s = 7\n" + good, url=others[0].url, two=TWO)
            file.write_text(broken) if text else file.unlink()
            refused = running.post({}, "/admin/reload")
            assert refused.status == 409, broken
            error = refused.error
            assert error["code"] == "not_reloaded"
            assert str(file) in error["message"]
            assert told.format(url=others[0].url) in error["message"]
            assert "\n" not in error["message"]
            assert {**state(running), "up_s": 0, "power": 0} == before, broken
        running.process.send_signal(signal.SIGHUP)
        wait_for(lambda: any(f"not reloaded: cannot read {file}" in x for x in running.log), 10)
        assert running.post(ask("good")).status == 200


def test_a_baseline_policy_keeps_its_replicas(others: list[ScriptedEngine], tmp_path: Path) -> None:
    file = tmp_path / "fleet.toml"
    policy = '[policy]\nroute = "round-robin"\n'
    file.write_text(pool("one", others[0].url) + policy)
    with gateway("--fleet", str(file)) as running:
        file.write_text(pool("one", others[0].url, others[1].url) + policy)
        refused = running.post({}, "/admin/reload")
        assert "pools can't be changed under policy.route round-robin" in refused.error["message"]
        refused = running.post({"cap_w": 500}, "/admin/cap")
        assert (refused.status, refused.error["code"]) == (409, "no_power_cap")
        file.write_text(pool("one", others[0].url) + policy + "[power]\ncap_w = 5\n")
        refused = running.post({}, "/admin/reload")
        assert "power.cap_w means nothing to policy.route" in refused.error["message"]
        assert running.post(ask("good")).status == 200


SWITCH = """
import os, pathlib, signal, subprocess, sys, time
what, folder = sys.argv[1], pathlib.Path(sys.argv[2])
pid = folder / "pid"
with (folder / "calls").open("a") as calls:
    calls.write(what + " " + os.environ["TOKENWORKS_REPLICA"] + "\\n")
if what == "start":
    if (folder / "calls").read_text().count("start") == 1:
        sys.exit("not the first time")
    command = [sys.executable, "-m", "tokenworks", "emulate", "h100", "llama-3.1-8b"]
    engine = subprocess.Popen([*command, "--port", os.environ["TOKENWORKS_PORT"]])
    pid.write_text(str(engine.pid))
else:
    number = int(pid.read_text())
    os.kill(number, signal.SIGTERM)
    while True:
        try:
            os.kill(number, 0)
        except ProcessLookupError:
            break
        time.sleep(0.05)
    pid.unlink()
"""


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        port: int = one.getsockname()[1]
        return port


def test_a_pool_is_started_when_it_is_needed_and_stopped_when_it_is_not(tmp_path: Path) -> None:
    script, file, calls = tmp_path / "switch.py", tmp_path / "fleet.toml", tmp_path / "calls"
    script.write_text(SWITCH)
    command = f"{sys.executable} {script}"
    file.write_text(
        f'[[pools]]\nname = "far"\nkind = "vllm"\nmodel = "llama-3.1-8b"\nprocessor = "h100"\n'
        f'urls = ["http://127.0.0.1:{free_port()}"]\nstart = "{command} start {tmp_path}"\n'
        f'stop = "{command} stop {tmp_path}"\nscale = {{least = 0, warm_s = 5, idle_s = 0.5}}\n'
    )
    hello = {"model": "llama-3.1-8b", "messages": [{"role": "user", "content": "hi"}]}
    try:
        with gateway("--fleet", str(file)) as running:
            assert engines(running) == {"far-0": "down"}
            assert not calls.exists()
            answer = running.post({**hello, "max_tokens": 3})
            assert answer.status == 200, answer.body
            # A start that fails is tried again; one that works is not.
            assert calls.read_text().splitlines() == ["start far-0", "start far-0"]
            wait_for(lambda: not (tmp_path / "pid").exists(), 30)
            assert calls.read_text().splitlines()[2:] == ["stop far-0"]
            assert running.post({**hello, "max_tokens": 3}).status == 200
            assert calls.read_text().splitlines()[3] == "start far-0"
            assert any("'" in line and "ended with 1" in line for line in running.log)
    finally:
        if (tmp_path / "pid").exists():
            os.kill(int((tmp_path / "pid").read_text()), signal.SIGTERM)


def test_without_commands_it_is_advice_on_screen(
    others: list[ScriptedEngine], tmp_path: Path
) -> None:
    file = tmp_path / "fleet.toml"
    scale = "scale = {least = 0, warm_s = 1, idle_s = 0.2}"
    file.write_text(pool("one", others[0].url, more=scale))
    with gateway("--fleet", str(file)) as running:
        assert running.post(ask("good")).status == 200
        told = "one-0 has nothing to do, and may be stopped"
        wait_for(lambda: told in state(running)["log"], 20)
        assert any(told in line for line in running.log)
        # Nobody stopped it: it is there at once when it is needed again.
        assert running.post(ask("good")).status == 200


def test_an_engine_that_is_not_there_is_asked_for(tmp_path: Path) -> None:
    port = free_port()
    file = tmp_path / "fleet.toml"
    with ScriptedEngine() as engine:
        file.write_text(
            pool("here", engine.url)
            + pool("far", f"http://127.0.0.1:{port}", more="scale = {least = 1, warm_s = 1}")
        )
        with gateway("--fleet", str(file)) as running:
            told = f"far-0 is needed: start the engine of http://127.0.0.1:{port}"
            assert running.post(ask("good")).status == 200
            wait_for(lambda: told in state(running)["log"], 20)
            assert any(f"far-0 at http://127.0.0.1:{port}" in line for line in running.log)


def test_a_page_in_a_browser_changes_nothing(relay: Running) -> None:
    for path in ("/admin/cap", "/admin/reload"):
        refused = relay.post({"cap_w": 5}, path, content_type="text/plain")
        assert (refused.status, refused.error["code"]) == (415, "unsupported_media_type")
    assert get(relay, "/admin/cap").json["cap_w"] is None


def test_the_state_is_complete(relay: Running) -> None:
    relay.post(ask("good"))
    found = state(relay)
    assert set(found) == {
        *("up_s", "draining", "ledger", "waiting", "power", "engines", "requests", "classes"),
        *("batches", "log"),
    }
    (engine,) = found["engines"]
    assert {"name", "model", "kind", "address", "state", "running", "slots"} <= set(engine)
    assert {"tokens", "watts", "joules", "scheduler"} <= set(engine)
    assert engine["tokens"] >= 3
    assert json.dumps(found)


@pytest.mark.parametrize("section", ["## Watch it", "## Change it while it runs"])
def test_the_settings_in_the_documents_can_be_loaded(section: str, tmp_path: Path) -> None:
    page = (Path(__file__).parents[2] / "docs" / "operate.md").read_text()
    text = page.partition(section)[2].partition("\n## ")[0]
    shown = re.findall(r"```toml\n(.*?)```", text, re.DOTALL)
    assert shown
    for block in shown:
        (tmp_path / "shown.toml").write_text(block)
        assert load(tmp_path / "shown.toml", {}) != Settings()
