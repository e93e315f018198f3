"""The engine's process: `python -m tokenworks.gateway.embedded.child`, started by the supervisor.

It reads one JSON line (a Launch) from its input, loads the model, says where it listens in one
JSON line, and works until its input ends, which is when whoever started it is gone.
"""

import contextlib
import ctypes
import os
import shutil
import signal
import sys
from pathlib import Path

import msgspec
import xllamacpp

from tokenworks.gateway.embedded.launch import STEP_TOKENS, Launch

_PR_SET_PDEATHSIG = 1
_LOG_WARNINGS = 2  # llama.cpp's levels: higher ones show what is asked and answered


def main() -> None:
    """Serve until the input ends."""
    launch = msgspec.json.decode(sys.stdin.buffer.readline(), type=Launch)
    _die_with_parent(signal.SIGKILL)
    if os.getppid() != launch.parent_pid:  # it was gone before we asked
        sys.exit(1)
    server = xllamacpp.Server(_params(launch))
    _die_with_parent(0)  # from here on the end of the input tells, and we can clean up
    print(msgspec.json.encode({"address": server.listening_address}).decode(), flush=True)  # noqa: T201
    sys.stdin.buffer.read()
    shutil.rmtree(Path(launch.socket_path).parent, ignore_errors=True)
    # llama.cpp would finish its requests first; whoever sent them is gone.
    os._exit(0)


def _params(launch: Launch) -> "xllamacpp.CommonParams":
    params = xllamacpp.CommonParams()
    params.model.path = launch.model_path
    params.model_alias = {launch.model_name}
    params.hostnames = [launch.socket_path]  # a name that ends in .sock is a socket file
    params.ui = False
    params.endpoint_slots = True
    params.endpoint_metrics = True
    params.verbosity = _LOG_WARNINGS
    params.n_parallel = launch.slots
    # The whole cache; each slot has its own part, so that the text of one request does not depend
    # on what runs beside it.
    params.n_ctx = launch.slots * launch.context_tokens
    params.kv_unified = False
    params.n_batch = params.n_ubatch = STEP_TOKENS
    params.cache_ram_mib = launch.prompt_cache_mib
    params.cpuparams.n_threads = launch.threads
    params.cpuparams_batch.n_threads = launch.threads
    # An open request holds one of these threads; a few more for health checks.
    params.n_threads_http = launch.slots + 8
    if launch.is_embedder:
        params.embedding = True
    if launch.kv_folder:
        # What is saved there is what was asked and answered.
        Path(launch.kv_folder).mkdir(mode=0o700, parents=True, exist_ok=True)
        params.slot_save_path = launch.kv_folder + "/"
    return params


def _die_with_parent(number: int) -> None:
    """The signal that ends us with our parent; 0: none.

    For the time the model is loading, when nobody reads the input (Linux; elsewhere: after it).
    """
    if sys.platform == "linux":
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, number)


if __name__ == "__main__":
    main()
