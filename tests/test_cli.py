"""The command line: help with examples, one readable line for every error."""

import json
import re
from pathlib import Path

import pytest

from tests.support import MODEL, run
from tokenworks import __version__

LARGE = "llama-3.1-70b"
DRAFTS = ("--draft-on", "groq-3-lpu", "--batch", "64", "--context", "4096")
DECODES = ("--decode-on", "h200", "--prefill", "120000")


@pytest.mark.parametrize(
    "command",
    [
        [],
        ["up"],
        ["keys"],
        ["keys", "add"],
        ["keys", "list"],
        ["keys", "revoke"],
        ["model"],
        ["model", "list"],
        ["model", "fetch"],
        ["model", "verify"],
        ["catalog"],
        ["cost"],
        ["replay"],
        ["compare"],
        ["top"],
        ["reload"],
        ["cap"],
        ["usage"],
        ["emulate"],
        ["bench"],
        ["calibrate"],
        ["parity"],
        ["lpu"],
        ["lpu", "compile"],
        ["lpu", "run"],
        ["lpu", "explain"],
        ["lpu", "trace"],
    ],
)
def test_every_command_helps_with_an_example(command: list[str]) -> None:
    done = run(*command, "--help")
    assert done.returncode == 0
    assert "Example: tokenworks " in done.stdout


def test_version() -> None:
    assert run("--version").stdout.strip() == __version__


@pytest.mark.parametrize(
    ("command", "told"),
    [
        (["frobnicate"], "frobnicate"),
        (["up", "--port", "lots"], "--port"),
        (["up", "--port", "70000"], "port must be from 0 to 65535"),
        (["up", "--slots", "0"], "engine.slots must be above zero"),
        (["up", "--tls-cert", "x.pem"], "tls_cert and tls_key go together"),
        (["up", "--model", "a.gguf", "--engine", "http://x"], "exclude each other"),
        (["up", "--engine", "ftp://x"], "no http or https URL"),
        (["up", "--engine", "http://x:port"], "malformed"),
        (["up", "--engine", "http://x", "--host", "0.0.0.0", "--no-require-key"], "require_key"),
        (["up", "--engine", "http://x", "--host", "no.such.host.invalid"], "without API keys"),
        (["up", "--config", "absent.toml"], "cannot read absent.toml"),
        (["keys", "add", "no good"], "no name for a key"),
        (["keys", "revoke", "nobody"], "there is no key 'nobody'"),
        (["model", "fetch", "gpt-9"], "no model 'gpt-9'"),
        (["catalog", "h10"], "Did you mean h100"),
        (["cost"], "cost needs a model and a processor"),
        (["cost", LARGE, "h10"], "no processor 'h10'. Did you mean h100"),
        (["cost", "lama-3.1-70b", "h100"], "no model 'lama-3.1-70b'. Did you mean llama-3.1-70b"),
        (["cost", LARGE, "h100", "--devices", "1"], "does not fit on 1 h100"),
        (["cost", LARGE, "h100", "--devices", "0"], "devices is 0"),
        (["cost", LARGE, "h100", "--devices", "-4"], "devices is -4"),
        (["cost", LARGE, "h100", "--devices", "3"], "tp=3 can't share the 64 attention heads"),
        (["cost", LARGE, "h100", "--pp", "3"], "can't be cut"),
        (["cost", LARGE, "h100", "--batch", "-1"], "batch is -1"),
        (["cost", LARGE, "h100", "--batch", "0"], "batch and prefill are both 0"),
        (["cost", LARGE, "h100", "--context", "-1"], "context is -1"),
        (["cost", LARGE, "h100", "--batch", "9999"], "weights and the cache take"),
        (["cost", LARGE, "h100", "--precision", "fp7"], "Did you mean fp8"),
        (["cost", LARGE, "h100", "--ep", "2"], "has no experts"),
        (["cost", LARGE, "l40s", "--set", "processor.l40s.memory.gddr.bytes=0"], "bytes is 0"),
        (["cost", LARGE, "h100", "--set", "processor.h100.tpd_w=3"], "Did you mean tdp_w"),
        (["cost", LARGE, "h100", "--tariff", "cheap"], "no tariff 'cheap'"),
        (["cost", LARGE, "h100", "--catalog", "absent.toml"], "cannot read the catalogue"),
        (["cost", "absent.json", "h100"], "cannot read the model's config absent.json"),
        (["cost", "absent.gguf", "h100"], "cannot read model file absent.gguf"),
        (["cost", "pyproject.toml", "h100"], "no model 'pyproject.toml'"),
        (["cost", LARGE, "h100", "--ffn-on", "h200"], "--ffn-on takes an LPU"),
        (["cost", LARGE, "h100", "--ffn-on", "h200", "--draft-on", "h200"], "exclude each other"),
        (["cost", LARGE, "groq-3-lpu", "--draft-on", "h100"], "can't be the first"),
        (["cost", LARGE, "h100", *DRAFTS, "--devices", "16"], "llama-3.1-8b does not fit"),
        (["cost", LARGE, "h100", *DECODES, "--devices", "2"], "does not fit on 2 h100"),
        (["cost", LARGE, "h100", "--chart", "/nowhere/x.html"], "cannot write /nowhere/x.html"),
    ],
)
def test_errors_are_one_readable_line(command: list[str], told: str, tmp_path: Path) -> None:
    done = run(*command, TOKENWORKS_CONFIG=str(tmp_path))
    assert done.returncode == 2
    assert told in done.stderr
    assert done.stderr.startswith("tokenworks: ")
    assert len(done.stderr.strip().splitlines()) == 1


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("port = 'x'", "Expected `int`, got `str` - at `$.port`"),
        ("prot = 1", "unknown field `prot`"),
        ("[engine]\nslots = 0", "engine.slots must be above zero"),
        ("[limits]\nqueue = -1", "limits.queue must be above zero"),
        ("[limits\n", "line 1"),
        ("\udcff", "factory.toml"),
    ],
)
def test_a_settings_file_that_is_wrong_names_file_and_key(
    text: str, told: str, tmp_path: Path
) -> None:
    file = tmp_path / "factory.toml"
    file.write_bytes(text.encode("utf-8", "surrogateescape"))
    done = run("up", "--config", str(file))
    assert done.returncode == 2
    assert "factory.toml" in done.stderr
    assert told in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


def test_an_unreachable_engine_is_one_readable_line() -> None:
    done = run("up", "--engine", "http://127.0.0.1:9", "--port", "0")
    assert done.returncode == 2
    assert "no engine answers at http://127.0.0.1:9" in done.stderr


def test_keys_are_shown_once_and_listed_without_their_secret(tmp_path: Path) -> None:
    here = {"TOKENWORKS_CONFIG": str(tmp_path)}
    assert "no keys" in run("keys", "list", **here).stdout
    made = run("keys", "add", "alice", **here)
    key = made.stdout.strip()
    assert key.startswith("tw-")
    listed = run("keys", "list", **here).stdout
    assert "alice" in listed
    assert key.split("-", 2)[2] not in listed
    assert run("keys", "add", "alice", **here).returncode == 2
    assert run("keys", "revoke", "alice", **here).returncode == 0
    assert "no keys" in run("keys", "list", **here).stdout
    (tmp_path / "keys.json").write_text("[]")
    broken = run("keys", "list", **here)
    assert broken.returncode == 2
    assert "keys.json" in broken.stderr


def test_models_are_listed_and_verified(tmp_path: Path) -> None:
    here = {"TOKENWORKS_CACHE": str(tmp_path)}
    assert MODEL in run("model", "list", **here).stdout
    assert "whole" not in run("model", "verify", **here).stdout
    missing = run("model", "verify", MODEL, **here)
    assert missing.returncode == 2
    assert "not fetched yet" in missing.stderr


def test_cost_tells_speed_joules_dollars_and_why() -> None:
    done = run("cost", LARGE, "h100", "--devices", "4", "--batch", "64", "--context", "1024")
    assert done.returncode == 0, done.stderr
    for told in ("tokens/s/user", "joules/token", "$/million tokens", "bound", "weights"):
        assert told in done.stdout
    assert re.search(
        r"processor.h100.memory.hbm.bytes_per_s +3.35 TB/s +datasheet +aic", done.stdout
    )


def test_cost_as_json_has_the_glossarys_names() -> None:
    done = run("cost", LARGE, "h100", "--devices", "4", "--batch", "64", "--json")
    answer = json.loads(done.stdout)
    assert answer["time_ns"] == answer["tpot_ns"] > 1e7
    assert answer["tokens_per_s_per_user"] == pytest.approx(1e9 / answer["time_ns"])
    assert answer["tokens_per_s"] == pytest.approx(64e9 / answer["time_ns"], rel=1e-6)
    assert answer["energy_j_per_token"] == pytest.approx(answer["energy_j"] / 64)
    assert answer["usd_per_mtok"] > 0
    assert answer["bound"] in ("weights", "kv", "compute", "link", "host")
    assert answer["numbers"]["processor.h100.idle_w"]["source"]
    assert "fit.h100.link_j_per_byte" in answer["assumptions"]
    prompt = run("cost", LARGE, "h100", "--batch", "0", "--prefill", "4096", "--json")
    assert json.loads(prompt.stdout)["tpot_ns"] is None


@pytest.mark.parametrize("joined", ["--decode-on", "--ffn-on", "--draft-on"])
def test_gpu_and_lpu_together(joined: str) -> None:
    done = run("cost", LARGE, "h100", "--devices", "4", joined, "groq-3-lpu", "--json")
    answer = json.loads(done.stdout)
    assert answer["tokens_per_s_per_user"] > 50
    assert "assumption.groq_3_lpu_w" in answer["assumptions"]


def test_a_model_and_a_processor_of_ones_own(tmp_path: Path) -> None:
    own = tmp_path / "mine.toml"
    own.write_text(
        """[processor.mine]
        kind = "gpu"
        flops.bf16 = 400e12
        memory.gddr.bytes = 48e9
        memory.gddr.bytes_per_s = 1.5e12
        tdp_w = 350"""
    )
    config = tmp_path / "tiny" / "config.json"
    config.parent.mkdir()
    config.write_text(
        json.dumps(
            {
                "model_type": "llama",
                "hidden_size": 512,
                "intermediate_size": 1024,
                "num_hidden_layers": 4,
                "num_attention_heads": 8,
                "vocab_size": 1000,
            }
        )
    )
    done = run("cost", str(config), "mine", "--catalog", str(own), "--json")
    answer = json.loads(done.stdout)
    assert answer["usd_per_mtok"] is None
    assert "price_usd" in answer["unpriced"]
    assert answer["numbers"]["processor.mine.tdp_w"] == {
        "value": 350.0,
        "grade": "user",
        "source": str(own),
        "note": "",
        "others": [],
    }
    config.write_text("[1]")
    assert "is no JSON object" in run("cost", str(config), "h100").stderr


def test_the_frontier_is_one_file_that_needs_no_network(tmp_path: Path) -> None:
    page = tmp_path / "frontier.html"
    assert run("cost", "gpt-oss-20b", "rtx-4090", "--chart", str(page)).returncode == 0
    html = page.read_text()
    assert "tokens\\u002fs per device" in html
    assert "gpt-oss-20b on rtx-4090" in html
    assert not re.search(r"<script[^>]+src=", html)


def test_validate_prints_the_errors() -> None:
    done = run("cost", "--validate")
    assert re.search(r"ITL +14 +\d+\.\d% +\d+\.\d%", done.stdout)
    assert len(json.loads(run("cost", "--validate", "--json").stdout)["rows"]) > 50


def test_catalog_shows_all_and_each_with_its_sources() -> None:
    listed = run("catalog").stdout
    for name in ("groq-3-lpu", "h100", "deepseek-v3"):
        assert name in listed
    shown = run("catalog", "groq-lpu-v1").stdout
    assert re.search(r"units.install_cycles +40 cycles +datasheet", shown)
    assert re.search(r" or +20 cycles", shown)
    assert "published: 8,030,261,248" in run("catalog", "llama-3.1-8b").stdout
    assert "moves" in run("catalog", "idle_fraction").stdout
    assert json.loads(run("catalog", "h100", "--json").stdout)["processor"]["numbers"]["tdp_w"]
