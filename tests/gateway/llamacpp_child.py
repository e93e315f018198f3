"""A llama.cpp server on a TCP port, as people run it: `python llamacpp_child.py MODEL PORT`."""

import sys
import threading

import xllamacpp


def main() -> None:
    model, port = sys.argv[1:]
    params = xllamacpp.CommonParams()
    params.model.path = model
    params.model_alias = {"my-model"}
    params.hostnames, params.port = ["127.0.0.1"], int(port)
    params.endpoint_slots = params.endpoint_metrics = True
    params.n_parallel, params.n_ctx, params.kv_unified = 4, 4 * 2048, False
    params.cache_ram_mib = 64
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
    server = xllamacpp.Server(params)
    sys.stdout.write(f"{server.listening_address}\n")
    sys.stdout.flush()
    threading.Event().wait()


if __name__ == "__main__":
    main()
