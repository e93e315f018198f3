"""Fleet files: those shown are sound and start; a wrong one is told in one line."""

import os
import shutil
from pathlib import Path

import pytest

from tests.gateway.scripted import ScriptedEngine
from tests.support import MODEL, exchange, gateway, run
from tokenworks.assets import store
from tokenworks.catalog.models import models
from tokenworks.cli.book import open_model, opened
from tokenworks.gateway.fleet import Means, Model, pools_of, rules_of, units_of
from tokenworks.gateway.settings import Settings, load

EXAMPLES = sorted((Path(__file__).parents[2] / "examples/fleets").glob("*.toml"))
HEAD = 'kind = "vllm"\nmodel = "m"\n'
AT = 'urls = ["http://127.0.0.1:9"]\n'
EMULATED = 'kind = "emulated"\nmodel = "llama-3.1-8b"\n'


def pool(text: str) -> str:
    return f"[[pools]]\n{text}"


# What is wrong; what the line says of the place, and of the remedy.
WRONG = {
    "no TOML": ("port = = 3", "at line 1", "docs/gateway.md"),
    "a word for a number": ('port = "eight"', "$.port", "Expected `int`"),
    "an unknown key": (pool(HEAD + AT + "slot = 3"), "$.pools[0]", "Did you mean 'slots'?"),
    "an unknown kind": (pool('kind = "vlm"\nmodel = "m"\n' + AT), "$.pools[0].kind", "'vlm'"),
    "no address": (pool(HEAD), "pools.vllm.urls", "give the address of each replica"),
    "an address that is none": (pool(HEAD + 'urls = ["h:80"]'), "pools.vllm", "http://HOST:PORT"),
    "one address twice": (
        pool(HEAD + 'urls = ["http://127.0.0.1:9", "http://127.0.0.1:9/v1"]'),
        "pools.vllm",
        "Give each engine once",
    ),
    "one name twice": (pool(HEAD + AT) + pool(HEAD + AT), "two pools 'vllm'", "`name`"),
    "no processor": (pool(EMULATED), "pools.emulated.processor", "which one"),
    "an unknown processor": (pool(EMULATED + 'processor = "h10"'), "pools.emulated", "h100"),
    "a model too large": (
        pool('kind = "emulated"\nmodel = "llama-3.1-405b"\nprocessor = "h100"\ndevices = 1'),
        "pools.emulated",
        "Use at least",
    ),
    "a context too long": (
        pool(EMULATED + 'processor = "h100"\ncontext_tokens = 99999999'),
        "pools.emulated",
        "Give fewer",
    ),
    "an unknown class": ("[classes.fast]\nttft_ms = 3", "classes.fast", "realtime"),
    "a negative bound": ("[classes.realtime]\nttft_ms = -3", "classes.realtime.ttft_ms", "above"),
    "a cap in words": ('[power]\ncap_w = "2.5kW"', "$.power.cap_w", "Expected `float"),
    "a key that is not there": (pool(HEAD + AT + 'key_env = "NO_KEY"'), "key_env", "Set it"),
    "a key's file that is not there": (
        pool(HEAD + AT + 'key_file = "/absent/key"'),
        "key_file",
        "/absent/key",
    ),
    "an authority that is not there": (
        pool(HEAD + 'urls = ["https://127.0.0.1:9"]\nca_file = "/absent.pem"'),
        "ca_file",
        "PEM",
    ),
    "half a command": (pool(HEAD + AT + 'start = "run \'it"'), "pools.vllm.start", "quotation"),
    "an unknown tariff": (
        'tariff = "nope"\n' + pool(EMULATED + 'processor = "h100"'),
        "tariff 'nope'",
        "default",
    ),
    "a tenant without weight": ("[tenants.a]\nweight = 0", "$.tenants.a", "above zero"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_fleet_file_is_one_clear_line(tmp_path: Path, name: str) -> None:
    text, place, remedy = WRONG[name]
    file = tmp_path / "fleet.toml"
    file.write_text(text)
    refused = run("up", "--fleet", str(file), "--port", "0", TOKENWORKS_STATE=str(tmp_path / "s"))
    (line,) = refused.stderr.strip().splitlines()
    assert refused.returncode == 2
    for told in (str(file), place, remedy):
        assert told in line, line


def test_a_fleet_that_is_not_there_is_one_line_too(tmp_path: Path) -> None:
    absent = str(tmp_path / "absent.toml")
    refused = run("up", "--fleet", absent)
    assert refused.returncode == 2
    assert refused.stderr.strip() == (
        f"tokenworks: cannot read {absent}: No such file or directory. "
        "Give the path of a TOML file."
    )


def test_an_engine_that_nobody_reaches_is_told_and_the_others_serve(
    tmp_path: Path, scripted_engine: ScriptedEngine
) -> None:
    fleet = tmp_path / "fleet.toml"
    lost = f'[[pools]]\nname = "lost"\nmodel = "away"\n{AT}'
    fleet.write_text(lost)
    refused = run("up", "--fleet", str(fleet), "--port", "0", TOKENWORKS_STATE=str(tmp_path / "s"))
    assert refused.returncode == 2
    assert "no engine answers at http://127.0.0.1:9" in refused.stderr.splitlines()[-1]
    here = f'[[pools]]\nname = "here"\nmodel = "m"\nurls = ["{scripted_engine.url}"]\n'
    fleet.write_text(lost + here)
    with gateway("--fleet", str(fleet), home=tmp_path) as running:
        assert any("lost-0" in line and "refused" in line for line in running.log)
        asked = {"model": "away", "messages": [{"role": "user", "content": "good"}]}
        for tier in ("priority", "flex"):  # others wait for it
            reply = running.post(asked | {"service_tier": tier})
            assert (reply.status, reply.error["code"]) == (503, "no_replica")
            assert reply.headers["x-refusal-reason"] == "no_replica"
            assert int(reply.headers["retry-after"]) >= 1
        reply = running.post(asked | {"model": "nobody"})
        assert (reply.status, reply.error["code"]) == (404, "model_not_found")
        assert running.post(asked | {"model": "m"}).status == 200


def means(folder: Path, settings: Settings) -> Means:
    """As a gateway would have them, with the default model's file."""
    found = {}
    for one in pools_of(settings):
        if one.kind == "embedded":
            path = store.ensure(models()[one.model])
            found[one.model] = Model(path, one.model, store.read_header(path))
    return Means(opened(None, None), open_model, found, folder)


@pytest.mark.engine
@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: str(path.stem))
def test_the_fleets_shown_are_sound(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GROQ_API_KEY", "none")
    settings = load(path, {})
    rules_of(settings).check()
    for one in pools_of(settings):
        units = units_of(one, means(tmp_path, settings), settings.tariff)
        assert len(units) == one.count
        assert {unit.spec.model for unit in units} == {one.model}


@pytest.mark.engine
def test_the_mixed_fleet_shown_starts_and_serves_all_of_it(tmp_path: Path) -> None:
    fleet = shutil.copy(EXAMPLES[0].parent / "mixed.toml", tmp_path)
    with gateway("--fleet", str(fleet), home=tmp_path) as running:
        asked = b"GET /admin/state HTTP/1.1\r\nhost: localhost\r\n\r\n"
        engines = exchange(running.address, asked).json["engines"]
        assert [e["name"] for e in engines] == ["gpu-0", "gpu-1", "lpu-0", "here-0"]
        assert {e["state"] for e in engines} == {"ready"}
        for model in ("llama-3.1-8b", MODEL):
            said = running.post({"model": model, "messages": [{"role": "user", "content": "Hi"}]})
            assert said.json["model"] == model


def test_groqs_key_is_never_told(tmp_path: Path) -> None:
    """The cloud can't be reached with it; the key is in no line of what is said."""
    secret = "gsk_not-a-real-key"
    text = (EXAMPLES[0].parent / "groq.toml").read_text()
    fleet = tmp_path / "groq.toml"
    fleet.write_text(text.replace("https://api.groq.com/openai/v1", "http://127.0.0.1:9/openai/v1"))
    environment = {"GROQ_API_KEY": secret, "TOKENWORKS_STATE": str(tmp_path / "s")}
    assert "GROQ_API_KEY" not in os.environ
    refused = run("up", "--fleet", str(EXAMPLES[0].parent / "groq.toml"), "--port", "0")
    assert "GROQ_API_KEY is not set" in refused.stderr
    only = tmp_path / "only.toml"
    only.write_text(fleet.read_text().partition('[[pools]]\nname = "here"')[0])
    refused = run("up", "--fleet", str(only), "--port", "0", "--verbose", **environment)
    assert "no engine answers at http://127.0.0.1:9/openai" in refused.stderr
    assert secret not in refused.stderr + refused.stdout
