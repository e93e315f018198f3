"""A model's folder in Hugging Face's form: config.json, tokenizer.json, safetensors."""

from pathlib import Path
from typing import Any

import msgspec

from tokenworks.assets import store
from tokenworks.errors import UserError
from tokenworks.model import tokenizer_json
from tokenworks.model.checkpoint import Checkpoint
from tokenworks.model.safetensors import Safetensors, SafetensorsError
from tokenworks.model.tokens import Vocabulary


def read(folder: Path) -> tuple[Checkpoint, Vocabulary]:
    """The model of a folder; UserError names the file that is missing, damaged or not known."""
    config = _table(folder / "config.json")
    settings_path = folder / "tokenizer_config.json"
    settings = _table(settings_path) if settings_path.exists() else {}
    template = folder / "chat_template.jinja"  # where later versions keep it
    if template.exists():
        text = store.read_bytes(template, "the chat template").decode("utf-8", "replace")
        settings["chat_template"] = text
    try:
        weights = Safetensors(
            {
                path.name: store.read_bytes(path, "weights", store.MODEL_BYTES)
                for path in _files(folder)
            }
        )
    except SafetensorsError as error:
        raise UserError(f"{folder}: {error}", "Fetch the file again.") from None
    found = Checkpoint(config, weights, folder.name)
    size = found.header.metadata["llama.vocab_size"]
    assert isinstance(size, int)
    tokenizer = store.read_bytes(folder / "tokenizer.json", "the tokenizer", 1 << 28)
    return found, tokenizer_json.vocabulary(tokenizer, settings, size, folder.name)


def _files(folder: Path) -> list[Path]:
    """Where the weights are: in one file, or in those that an index lists."""
    index = folder / "model.safetensors.index.json"
    if not index.exists():
        return [folder / "model.safetensors"]
    places = _table(index).get("weight_map")
    names = places.values() if isinstance(places, dict) else ()
    if not names or not all(isinstance(name, str) and "/" not in name for name in names):
        raise UserError(f"{index} lists no files", "Fetch it again.")
    return [folder / name for name in sorted(set(names))]


def _table(path: Path) -> dict[str, Any]:
    raw = store.read_bytes(path, path.name)
    try:
        return msgspec.json.decode(raw, type=dict[str, Any])
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is no JSON object: {error}", "Fetch it again.") from None
