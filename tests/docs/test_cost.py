"""docs/cost.md says what is: its tables are what the commands print, its examples run."""

import os
import re
import shlex
from pathlib import Path

import pytest

from tests.docs.test_docs import ROOT, blocks
from tests.support import run
from tokenworks.catalog.book import catalog
from tokenworks.catalog.quantity import told
from tokenworks.units import show, unit_of

PAGE = (ROOT / "docs/cost.md").read_text()


def indented(text: str) -> str:
    return "\n".join(f"    {line.rstrip()}".rstrip() for line in text.rstrip().splitlines())


def test_the_error_table_is_what_the_command_prints() -> None:
    assert indented(run("cost", "--validate").stdout) in PAGE


def test_the_answer_shown_is_what_the_command_prints() -> None:
    command = re.search(r"^    \$ tokenworks (.*)$", PAGE, re.MULTILINE)
    assert command is not None
    assert indented(run(*shlex.split(command[1])).stdout) in PAGE


def test_every_assumption_is_listed_with_its_value() -> None:
    for record in catalog().tables["assumption"].values():
        number = record.need("value")
        row = f"| `{record.name}` | {show(number.value, unit_of(record.name))} | {record.moves} |"
        assert row in PAGE


def test_every_other_assumed_number_is_listed() -> None:
    for table in ("processor", "tariff", "fit"):
        for record in catalog().tables[table].values():
            for path, number in record.numbers.items():
                if number.grade == "assumed":
                    row = f"| `{table}.{record.name}.{path}` | {told(path, number)} |"
                    assert row in PAGE


EXAMPLES = re.findall(r"^    tokenworks (cost .*)$", PAGE, re.MULTILINE)


@pytest.mark.parametrize("command", EXAMPLES)
def test_every_example_runs(command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (own,) = blocks(PAGE, "toml")
    (tmp_path / "mine.toml").write_text(own)
    (tmp_path / "config.json").write_text(
        '{"model_type": "llama", "hidden_size": 512, "intermediate_size": 1024, "vocab_size": 1000,'
        '"num_hidden_layers": 4, "num_attention_heads": 8}'
    )
    path = os.pathsep.join([str(ROOT / "src"), os.environ.get("PYTHONPATH", "")])
    words = shlex.split(command, comments=True)
    if "mymodel.gguf" in words:
        words[words.index("mymodel.gguf")] = "llama-3.1-8b"
    monkeypatch.chdir(tmp_path)
    done = run(*words, PYTHONPATH=path)
    assert done.returncode == 0, done.stderr
    assert "bound" in done.stdout


def test_the_library_example_runs(capsys: pytest.CaptureFixture[str]) -> None:
    (program,) = blocks(PAGE, "python")
    exec(program, {})
    step_ns, joules = capsys.readouterr().out.split()
    assert int(step_ns) > 1e7
    assert float(joules) > 1e4
