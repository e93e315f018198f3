"""What llama.cpp says of a text on the same file: for each place the likeliest next token, and the
log-probability of the one that comes. Run as a program of its own: its library stays out of ours.

    python -m tests.lpu.llama MODEL.gguf < tokens.json > answers.json
"""

import json
import os
import sys
import urllib.request
from typing import Any

import xllamacpp

_PROBABLE = 256


def serve(path: str, context: int) -> "xllamacpp.Server":
    params = xllamacpp.CommonParams()
    params.model.path = path
    params.n_ctx = context
    params.n_parallel = 1
    params.verbosity = 1
    params.ui = False
    params.cpuparams.n_threads = 1  # more would wait for one another where cores are busy
    params.hostnames = ["127.0.0.1"]
    params.port = 0
    return xllamacpp.Server(params)


def ask(address: str, body: dict[str, Any]) -> dict[str, Any]:
    request = urllib.request.Request(
        f"{address}/completion", json.dumps(body).encode(), {"content-type": "application/json"}
    )
    with urllib.request.urlopen(request) as answer:
        return dict(json.load(answer))


def said(address: str, tokens: list[int], following: int) -> tuple[int, float]:
    """The likeliest token after `tokens`, and the log-probability of `following`."""
    for probable in (_PROBABLE, 1 << 17):
        answer = ask(address, {
            "prompt": tokens, "n_predict": 1, "n_probs": probable, "temperature": 0,
            "cache_prompt": True, "post_sampling_probs": False,
        })  # fmt: skip
        found = answer["completion_probabilities"][0]["top_logprobs"]
        for each in found:
            if each["id"] == following:
                return found[0]["id"], each["logprob"]
    raise AssertionError("not even among all tokens")


def main() -> None:
    chunks = json.load(sys.stdin)
    server = serve(sys.argv[1], max(map(len, chunks)) + 8)
    answers = [
        [said(server.listening_address, chunk[: at + 1], chunk[at + 1])
         for at in range(len(chunk) - 1)]
        for chunk in chunks
    ]  # fmt: skip
    json.dump(answers, sys.stdout)
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    main()
