import asyncio
import json
import logging
import os
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.engine.drive import drive, placements
from tokenworks.engine.build import build
from tokenworks.engine.continuous import ContinuousBatch
from tokenworks.engine.work import Limits, Work
from tokenworks.errors import UserError
from tokenworks.gateway.energy import energy as energy_module
from tokenworks.gateway.energy import prometheus
from tokenworks.gateway.energy.account import PATIENCE_NS, Account, Part
from tokenworks.gateway.energy.energy import Energy
from tokenworks.gateway.energy.meters import (
    Devices,
    Grade,
    Integral,
    MeterSettings,
    Modelled,
    Rapl,
    amd,
    nvml,
)
from tokenworks.gateway.energy.prometheus import Prometheus, Selector
from tokenworks.sched.forecast import Forecast
from tokenworks.units import NJ_PER_J, NS_PER_S

S = NS_PER_S


# One replica's account


def figures(settled: list[Part]) -> dict[str, float]:
    return {one.id: one.energy_nj / NJ_PER_J for one in settled}


def conserved(account: Account) -> None:
    sums = account.totals
    assert sums.attributed_nj + sums.idle_nj + sums.unattributed_nj == sums.meter_nj
    assert min(sums) >= 0


def test_two_requests_pay_by_what_their_work_should_take() -> None:
    account = Account(0, idle_w=100)
    assert account.tick(1000.0, 0) == []
    account.began("a", 10.0, 1.0, 0)
    account.began("b", 10.0, 1.0, 0)
    account.progress("a", 10)
    account.progress("b", 50)
    account.tick(1400.0, S)
    # They can have taken 80 J in that second; an idle second takes 100. So 20 J were idle.
    assert account.totals.idle_nj == 20 * NJ_PER_J
    account.ended("a", 10, S)
    account.ended("b", 50, S)
    found = account.tick(1500.0, 2 * S)
    assert figures(found) == pytest.approx({"a": 380 / 4, "b": 380 * 3 / 4})
    assert all(one.is_measured for one in found)
    assert account.totals.meter_nj == account.totals.measured_nj == 500 * NJ_PER_J
    assert account.totals.idle_nj == 120 * NJ_PER_J
    assert account.watts == pytest.approx(100)


def test_a_request_shorter_than_an_interval_pays_for_its_part_of_it() -> None:
    account = Account(0, idle_w=100)
    account.tick(0.0, 0)
    account.began("a", 10.0, 1.0, S // 4)
    told = account.ended("a", 50, S // 2)
    assert told == 60 * NJ_PER_J
    (one,) = account.tick(140.0, S)
    assert (one.energy_nj, one.told_nj) == (65 * NJ_PER_J, 60 * NJ_PER_J)
    assert one.is_measured
    assert account.totals.idle_nj == 75 * NJ_PER_J


def test_what_the_model_errs_by_is_learned_for_the_figure_in_the_answer() -> None:
    account = Account(0)
    account.tick(0.0, 0)
    for second in range(1, 5):
        account.began("a", 10.0, 1.0, second * S)
        told = account.ended("a", 90, second * S)
        assert told == (100 if second == 1 else 150) * NJ_PER_J
        assert figures(account.tick(150.0 * second, second * S + S // 2)) == {"a": 150.0}


def test_a_prompt_that_is_read_for_seconds_is_paid_while_it_is_read() -> None:
    account = Account(0, busy_w=500)
    account.tick(0.0, 0)
    account.began("writes", 0.0, 1.0, 0)
    account.began("reads", 1000.0, 1.0, 0)
    account.began("is next", 1000.0, 1.0, 0)
    spent = []
    for second in range(1, 4):
        account.progress("writes", 500 * second)
        if second == 3:
            account.progress("reads", 1)
        account.tick(1000.0 * second, second * S)
        spent.append(account.totals.attributed_nj)
    assert spent == [1000 * second * NJ_PER_J for second in range(1, 4)]
    account.ended("writes", 1500, 3 * S)
    account.ended("reads", 1, 3 * S)
    account.ended("is next", 0, 3 * S)  # its client left: it pays for nothing that wasn't read
    found = figures(account.tick(3000.0, 4 * S))
    assert found["reads"] == pytest.approx(1001, abs=1)
    assert found["writes"] == pytest.approx(1500, abs=1)
    assert found["is next"] == pytest.approx(499, abs=1)


def test_an_interval_is_as_long_as_the_exporter_makes_it() -> None:
    account = Account(0)
    account.tick(0.0, 0)
    account.began("a", 5.0, 0.1, 0)
    account.ended("a", 50, S)
    for second in range(1, 30):
        assert account.tick(None, second * S) == []
    (one,) = account.tick(300.0, 30 * S)
    assert one.is_measured
    assert one.energy_nj == 300 * NJ_PER_J


def test_after_a_minute_without_a_reading_joules_are_modelled() -> None:
    account = Account(0, idle_w=10)
    account.tick(0.0, 0)
    account.began("a", 5.0, 0.1, 0)
    account.ended("a", 50, 0)
    assert account.tick(None, PATIENCE_NS - 1) == []
    (one,) = account.tick(None, PATIENCE_NS)
    assert (one.energy_nj, one.is_measured) == (10 * NJ_PER_J, False)
    account.began("b", 5.0, 0.1, PATIENCE_NS)
    account.ended("b", 50, PATIENCE_NS)
    (one,) = account.tick(5000.0, PATIENCE_NS + S)  # from where on, nobody knows
    assert (one.id, one.is_measured) == ("b", False)
    account.began("c", 5.0, 0.1, PATIENCE_NS + S)
    account.ended("c", 50, PATIENCE_NS + 2 * S)
    (one,) = account.tick(5020.0, PATIENCE_NS + 2 * S)
    assert (one.energy_nj, one.is_measured) == (20 * NJ_PER_J, True)
    conserved(account)


def test_one_interval_that_was_not_measured_makes_the_whole_modelled() -> None:
    account = Account(0)
    account.tick(0.0, 0)
    account.began("a", 5.0, 0.1, 0)
    account.progress("a", 10)
    account.tick(100.0, S)
    account.tick(3.0, 2 * S)  # the driver was loaded anew
    account.ended("a", 20, 2 * S)
    (one,) = account.tick(50.0, 3 * S)
    assert not one.is_measured
    assert one.energy_nj >= 100 * NJ_PER_J
    conserved(account)


def test_idle_watts_are_learned_from_intervals_that_nobody_is_there() -> None:
    account = Account(0, idle_w=100)
    account.tick(0.0, 0)
    account.tick(130.0, S)
    assert account.totals.idle_nj == 130 * NJ_PER_J
    account.tick(330.0, 2 * S)  # somebody else is there
    assert account.totals.unattributed_nj == 70 * NJ_PER_J
    assert account.idle_w == 130


def test_a_modelled_account_says_at_once_what_it_will_say_in_the_end() -> None:
    account = Account(0, idle_w=100)
    account.began("a", 20.0, 0.5, 0)
    account.progress("a", 60)
    account.tick(None, S // 2)
    told = account.ended("a", 100, S)
    (one,) = account.tick(None, 2 * S)
    assert one.energy_nj == told == 70 * NJ_PER_J
    assert not one.is_measured
    assert account.totals.measured_nj == 0
    conserved(account)


EVENTS = st.lists(
    st.tuples(
        st.sampled_from(["began", "progress", "ended", "read", "silence", "anew"]),
        st.integers(0, 3 * 10**9),  # nanoseconds since the one before
        st.integers(0, 7),  # who
        st.floats(0, 1e6),  # joules
    ),
    max_size=60,
)


@given(EVENTS, st.floats(0, 500), st.floats(0, 900))
def test_receipts_idle_and_unattributed_are_the_meter(
    events: list[tuple[str, int, int, float]], idle_w: float, busy_w: float
) -> None:
    account = Account(0, idle_w=idle_w, busy_w=busy_w)
    now_ns, reading, open_ids, finals = 0, 0.0, set[str](), list[Part]()
    begun = 0
    base, since_ns, measured = None, 0, 0  # what a patient observer would count
    for number, (what, wait_ns, who, joules) in enumerate(events):
        now_ns += wait_ns
        ident = f"{who}"
        match what:
            case "began" if ident not in open_ids:
                open_ids.add(ident)
                begun += 1
                account.began(ident, joules / 1000, joules / 1e6, now_ns, tokens=who)
            case "progress" if ident in open_ids:
                account.progress(ident, number)
            case "ended" if ident in open_ids:
                open_ids.remove(ident)
                account.ended(ident, number, now_ns)
            case "read" | "anew":
                reading = reading + joules if what == "read" else joules
                nj = round(reading * NJ_PER_J)
                if base is not None and nj >= base:
                    measured += nj - base
                base, since_ns = nj, now_ns
                finals += account.tick(reading, now_ns)
            case "silence":
                if base is None or now_ns - since_ns >= PATIENCE_NS:
                    base, since_ns = None, now_ns
                finals += account.tick(None, now_ns)
        conserved(account)
        assert account.totals.measured_nj == measured
    for ident in open_ids:
        account.ended(ident, 0, now_ns)
    finals += account.close(now_ns)
    conserved(account)
    assert all(one.energy_nj >= 0 for one in finals)
    assert sum(one.energy_nj for one in finals) == account.totals.attributed_nj
    assert len(finals) == begun


# Beside an engine that charges each step to those who took part in it


def test_receipts_are_near_what_the_engine_charges_by_the_step() -> None:
    prepared = placements()["dense"]
    limits = Limits()
    engine = build(prepared, limits)
    assert isinstance(engine, ContinuousBatch)
    works = [
        (n * S * 3 // 10, Work(n, 300 + 1100 * (n % 3), 60 + 140 * (n % 4), 0)) for n in range(40)
    ]
    notices = drive(engine, works)
    first_ns = {n.id: n.at_ns for n in notices if n.kind == "first"}
    end_ns = {n.id: n.at_ns for n in notices if n.kind == "finished"}
    charged = {str(n.id): n.energy_nj / NJ_PER_J for n in notices if n.kind == "finished"}
    meter = engine.meter
    assert meter.over_time.slot_ns == S
    forecast = Forecast(prepared, limits.step_tokens, limits.sequences)
    account = Account(0, idle_w=meter.idle_mw / 1000, busy_w=forecast.peak_w)
    total_nj = 0
    account.tick(0.0, 0)
    happened = [(at_ns, 0, work) for at_ns, work in works]
    happened += [(end_ns[work.id], 1, work) for _, work in works]
    happened.sort(key=lambda entry: entry[:2])
    finals: dict[str, float] = {}
    for second, (busy_ns, energy_nj, *_) in enumerate(zip(*meter.over_time.fields, strict=True)):
        now_ns = (second + 1) * S
        while happened and happened[0][0] <= now_ns:
            at_ns, is_end, work = happened.pop(0)
            if is_end:
                account.ended(str(work.id), work.output_tokens, at_ns)
            else:
                # As a promise has them: the prompt's, and a share of a step with those there.
                count = len(account.open) + 1
                each_j = forecast.energy_j(count, count * (work.prompt_tokens + 100)) / count
                read_j = forecast.alone(work.prompt_tokens)[1]
                account.began(str(work.id), read_j, each_j, at_ns)
        for ident in map(int, account.open):
            if first_ns[ident] < now_ns:
                part = (now_ns - first_ns[ident]) / (end_ns[ident] - first_ns[ident])
                account.progress(str(ident), max(round(part * works[ident][1].output_tokens), 1))
        total_nj += energy_nj + round(meter.idle_mw / 1000 * (S - busy_ns))
        finals |= figures(account.tick(total_nj / NJ_PER_J, now_ns))
    assert finals.keys() == charged.keys()
    conserved(account)
    assert sum(finals.values()) == pytest.approx(sum(charged.values()), rel=0.02)
    off = sorted(abs(finals[ident] / charged[ident] - 1) for ident in charged)
    assert off[len(off) // 2] < 0.1
    assert off[-1] < 0.5


# Settings


def settings(**values: Any) -> MeterSettings:
    return msgspec.convert(values, MeterSettings)


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"kind": "nvml"}, "needs devices"),
        ({"kind": "amd"}, "needs devices"),
        ({"kind": "nvml", "devices": [-1]}, "counted from 0"),
        ({"kind": "rapl", "devices": ["GPU-1"]}, "packages"),
        ({"kind": "prometheus"}, "url"),
        ({"kind": "nvml", "devices": [0], "url": "http://h/metrics"}, "prometheus meters only"),
        ({"kind": "wattmeter"}, "Invalid enum value"),
        ({"kind": "nvml", "device": 0}, "unknown field"),
    ],
)
def test_wrong_settings_are_refused(values: dict[str, Any], says: str) -> None:
    with pytest.raises(msgspec.ValidationError, match=says):
        settings(**values)


def test_replicas_share_devices_evenly_or_have_a_host_each() -> None:
    gpus = settings(kind="nvml", devices=[0, 1, 2, "GPU-3"])
    parts = [gpus.of_replica(n, 2, "h", "gpu").devices for n in range(2)]
    assert parts == [(0, 1), (2, "GPU-3")]
    assert gpus.of_replica(0, 1, "h", "gpu") == gpus
    with pytest.raises(UserError, match="pool gpu: its meter can't tell 3 replicas apart"):
        gpus.of_replica(0, 3, "h", "gpu")
    with pytest.raises(UserError, match="can't tell 2 replicas apart"):
        settings(kind="rapl").of_replica(0, 2, "h", "cpu")
    far = settings(kind="prometheus", url="http://{host}:9400/metrics", devices=[0])
    part = far.of_replica(1, 2, "10.0.0.6", "gpu")
    assert (part.url, part.devices) == ("http://10.0.0.6:9400/metrics", (0,))
    assert settings().of_replica(1, 2, "h", "gpu") == settings()


# Meters of this machine


@pytest.mark.parametrize(("kind", "library", "opened"), [
    ("nvml", "pynvml", nvml), ("amd", "amdsmi", amd),
])  # fmt: skip
def test_a_library_that_is_missing_is_named_with_the_pool(
    kind: str, library: str, opened: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(UserError) as caught:
        opened([0], "pool gpu")
    assert caught.value.message == f"pool gpu: meter {kind} needs the library {library}"
    assert "pip install 'tokenworks[energy]'" in caught.value.remedy


@pytest.mark.skipif(shutil.which("nvidia-smi") is not None, reason="this machine has a GPU")
def test_nvml_without_a_driver_is_one_readable_error() -> None:
    pytest.importorskip("pynvml")
    with pytest.raises(UserError, match="pool gpu: NVML can't read GPU 0, GPU-7: ") as caught:
        nvml([0, "GPU-7"], "pool gpu")
    assert "nvidia-smi -L" in caught.value.remedy


@pytest.mark.skipif(shutil.which("nvidia-smi") is None, reason="this machine has no NVIDIA GPU")
def test_a_real_gpu_draws_something() -> None:
    meter = nvml([0], "pool gpu")
    before = meter.joules()
    time.sleep(1.5)
    after = meter.joules()
    assert before is not None
    assert after is not None
    assert 1 < after - before < 3000


class Refused(Exception):
    pass


def test_devices_without_a_counter_have_their_watts_summed_up() -> None:
    def refuse() -> float:
        raise Refused("Not Supported")

    meter = Devices("pool gpu", refuse, lambda: 300.0, Refused)
    assert meter.joules() == 0.0
    later = meter.joules()
    assert later is not None
    assert later > 0
    with pytest.raises(Refused):
        Devices("pool gpu", refuse, refuse, Refused)


def test_watts_are_summed_as_the_mean_of_both_ends() -> None:
    times = iter([0, S, 3 * S])
    integral = Integral(lambda: next(times))
    assert [integral.add(watts) for watts in (100.0, 200.0, 0.0)] == [0.0, 150.0, 350.0]


def test_trouble_with_a_meter_is_told_once_and_its_end_too(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO)
    reads: list[float | None] = [1.0, 2.0, None, None, 3.0, 3.0, 4.0]

    def counted() -> float:
        found = reads.pop(0)
        if found is None:
            raise Refused("GPU is lost")
        return found

    meter = Devices("pool gpu", counted, float, Refused)
    # A counter that stands still is no reading: nobody has looked since.
    assert [meter.joules() for _ in range(6)] == [2.0, None, None, 3.0, None, 4.0]
    assert [record.message for record in caplog.records] == [
        "pool gpu: its devices: GPU is lost; joules are modelled until it can be read",
        "pool gpu: its devices can be read again",
    ]


def zone(root: Path, number: str, name: str, microjoules: int, most: int = 10**6) -> Path:
    folder = root / f"intel-rapl:{number}"
    folder.mkdir()
    for file, text in (("name", name), ("energy_uj", microjoules), ("max_energy_range_uj", most)):
        (folder / file).write_text(f"{text}\n")
    return folder / "energy_uj"


def test_rapl_counts_packages_with_their_memory_and_beyond_the_counters_end(
    tmp_path: Path,
) -> None:
    first = zone(tmp_path, "0", "package-0", 900_000)
    zone(tmp_path, "0:0", "core", 500_000)
    memory = zone(tmp_path, "0:1", "dram", 0)
    second = zone(tmp_path, "1", "package-1", 100)
    zone(tmp_path, "2", "psys", 7)  # the whole machine: it has the others in it
    both, one = Rapl((), "pool cpu", tmp_path), Rapl((1,), "pool cpu", tmp_path)
    assert (both.joules(), one.joules()) == (0.0, 0.0)
    first.write_text("100000")  # 200,000 more, over the end of its range
    memory.write_text("30000")
    second.write_text("5100")
    assert both.joules() == pytest.approx(0.235)
    assert one.joules() == pytest.approx(0.005)


def test_rapl_where_there_is_none_is_one_readable_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="pool cpu: this machine shows no energy counters"):
        Rapl((), "pool cpu", tmp_path)
    zone(tmp_path, "0", "package-0", 1)
    with pytest.raises(UserError, match="no processor package 3"):
        Rapl((3,), "pool cpu", tmp_path)


def test_rapl_that_only_root_may_read_is_told_once(caplog: pytest.LogCaptureFixture) -> None:
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        root.chmod(0o755)
        counter = zone(root, "0", "package-0", 1)
        counter.chmod(0o400)
        meter = Rapl((), "pool cpu", root)
        is_root = os.geteuid() == 0
        if not is_root:
            counter.chmod(0)
        try:
            if is_root:
                os.seteuid(65534)
            assert meter.joules() is None
            assert meter.joules() is None
        finally:
            if is_root:
                os.seteuid(0)
        assert len(caplog.records) == 1
        assert f"{counter} may be read by root only" in caplog.records[0].message
        counter.chmod(0o444)
        assert meter.joules() == 0.0


# Meters behind an address


class Exporter:
    """Answers as its `says` wants, on loopback."""

    def __init__(self) -> None:
        self.says: Callable[[str], tuple[int, str]] = lambda path: (404, "")
        self.seen: list[tuple[str, str]] = []
        exporter = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                exporter.seen.append((self.path, self.headers.get("authorization", "")))
                status, text = exporter.says(self.path)
                body = text.encode()
                self.send_response(status)
                self.send_header("content-length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()


@pytest.fixture
def exporter(monkeypatch: pytest.MonkeyPatch) -> Iterator[Exporter]:
    monkeypatch.setattr(prometheus, "_FRESH_S", -1.0)
    monkeypatch.setattr(prometheus, "_TIMEOUT_S", 0.3)
    served = Exporter()
    yield served
    served.server.shutdown()
    served.server.server_close()


DCGM = """# HELP DCGM_FI_DEV_GPU_TEMP GPU temperature (in C).
# TYPE DCGM_FI_DEV_GPU_TEMP gauge
DCGM_FI_DEV_GPU_TEMP{gpu="0",UUID="GPU-aa",device="nvidia0",modelName="NVIDIA H100"} 35
# HELP DCGM_FI_DEV_POWER_USAGE Power draw (in W).
# TYPE DCGM_FI_DEV_POWER_USAGE gauge
DCGM_FI_DEV_POWER_USAGE{gpu="0",UUID="GPU-aa",device="nvidia0",modelName="NVIDIA H100"} 200.5
DCGM_FI_DEV_POWER_USAGE{gpu="1",UUID="GPU-bb",device="nvidia1",modelName="NVIDIA H100"} 300.5
# HELP DCGM_FI_DEV_TOTAL_ENERGY_CONSUMPTION Total energy consumption since boot (in mJ).
# TYPE DCGM_FI_DEV_TOTAL_ENERGY_CONSUMPTION counter
DCGM_FI_DEV_TOTAL_ENERGY_CONSUMPTION{gpu="0",UUID="GPU-aa",pod="say \\"hi\\", {x}"} %d
DCGM_FI_DEV_TOTAL_ENERGY_CONSUMPTION{gpu="1",UUID="GPU-bb",pod="b"} %d
"""


def behind(exporter: Exporter, path: str = "/metrics", **more: Any) -> Prometheus:
    meter = settings(kind="prometheus", url=exporter.url + path, **more)
    return Prometheus(meter, "pool gpu", {})


def test_dcgms_counters_are_millijoules_of_the_devices_given(exporter: Exporter) -> None:
    meters = [
        behind(exporter),
        behind(exporter, devices=[1]),
        behind(exporter, devices=["GPU-aa"]),
        behind(exporter, query='DCGM_FI_DEV_TOTAL_ENERGY_CONSUMPTION{pod=~"b|c",gpu!="0"}'),
    ]
    exporter.says = lambda path: (200, DCGM % (5_000_000, 7_000_000))
    assert [meter.joules() for meter in meters] == [-1.0] * 4  # a count begins
    exporter.says = lambda path: (200, DCGM % (5_001_000, 7_250_000))
    found = [meter.joules() for meter in meters]
    assert found == pytest.approx([250.0, 249.0, 0.0, 249.0])
    assert [meter.joules() for meter in meters] == [None] * 4  # the exporter hasn't looked since


def test_a_count_that_begins_anew_or_has_another_device_is_known_by_being_lower(
    exporter: Exporter,
) -> None:
    meter, account = behind(exporter), Account(0)
    lines = DCGM.splitlines(keepends=True)
    pages = [
        DCGM % (5_000_000, 7_000_000),
        DCGM % (5_001_000, 7_001_000),
        DCGM % (1_000, 7_002_000),
        DCGM % (2_000, 7_003_000),
        "".join(lines[:-1]) % 3_000,
        DCGM % (4_000, 7_005_000),
        DCGM % (5_000, 7_006_000),
    ]
    measured = []
    for second, page in enumerate(pages):
        exporter.says = lambda path, page=page: (200, page)  # type: ignore[misc]
        account.tick(meter.joules(), second * S)
        measured.append(account.totals.measured_nj / NJ_PER_J)
    assert measured == pytest.approx([0, 2, 2, 4, 4, 4, 6])


def test_watts_of_an_exporter_are_summed_over_time(exporter: Exporter) -> None:
    exporter.says = lambda path: (200, DCGM % (1, 1))
    meter = behind(exporter, query="DCGM_FI_DEV_POWER_USAGE")
    began = time.monotonic()
    assert meter.joules() == 0.0
    time.sleep(0.05)
    found = meter.joules()
    assert found is not None
    assert 0.05 * 501 <= found <= (time.monotonic() - began) * 501


def vector(*values: tuple[dict[str, str], str]) -> str:
    result = [{"metric": labels, "value": [1_700_000_000.1, value]} for labels, value in values]
    data = {"resultType": "vector", "result": result}
    return json.dumps({"status": "success", "data": data})


def test_a_prometheus_server_is_asked_in_its_own_language(
    exporter: Exporter, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("METER_KEY", "s3cret")
    query = 'sum(DCGM_FI_DEV_TOTAL_ENERGY_CONSUMPTION{Hostname="a"}) / 1000'
    sum_ = behind(exporter, "/prom", query=query, unit="J", key_env="METER_KEY")
    exporter.says = lambda path: (200, vector(({}, "1000.5")))
    assert sum_.joules() == -1.0
    exporter.says = lambda path: (200, vector(({}, "1010.75")))
    assert sum_.joules() == pytest.approx(9.25)
    path, key = exporter.seen[-1]
    assert urlsplit(path).path == "/prom/api/v1/query"
    assert parse_qs(urlsplit(path).query) == {"query": [query]}
    assert key == "Bearer s3cret"
    each = behind(exporter, "/api/v1/query", devices=[0, 1])
    two = ({"gpu": "0"}, "1000"), ({"gpu": "1"}, "3000")
    exporter.says = lambda path: (200, vector(*two, ({"gpu": "2"}, "9000")))
    each.joules()
    exporter.says = lambda path: (
        200,
        vector(*two[:1], ({"gpu": "1"}, "5000"), ({"gpu": "2"}, "1")),
    )
    assert each.joules() == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("path", "answer", "says"),
    [
        ("/metrics", (404, "no"), "it answers 404"),
        ("/metrics", (302, ""), "it answers 302"),
        ("/metrics", (200, ""), "the metric is not there"),
        ("/metrics", (200, "DCGM_FI_DEV_TOTAL_ENERGY_CONSUMPTION{gpu= 5"), ""),
        ("/metrics", (200, "DCGM_FI_DEV_TOTAL_ENERGY_CONSUMPTION NaN\n"), "no number"),
        ("/metrics", (200, "DCGM_FI_DEV_TOTAL_ENERGY_CONSUMPTION -4\n"), "no number"),
        ("/metrics", (200, "\x00\xff<html>"), "the metric is not there"),
        ("", (200, "<html>"), ""),
        ("", (200, "[]"), "none of Prometheus'"),
        ("", (200, '{"status":"error","error":"bad"}'), "none of Prometheus'"),
        ("", (422, '{"status":"error"}'), "it answers 422"),
        ("", (200, vector()), "the metric is not there"),
        ("", (200, vector(({}, "+Inf"))), "no number"),
    ],
)
def test_answers_that_are_of_no_use_are_told_once(
    path: str, answer: tuple[int, str], says: str, exporter: Exporter,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    meter = behind(exporter, path)
    exporter.says = lambda path: answer
    assert [meter.joules() for _ in range(3)] == [None] * 3
    (record,) = caplog.records
    assert record.message.startswith(f"pool gpu: its meter at {exporter.url}{path}: ")
    assert says in record.message


def test_an_address_that_is_slow_or_gone_is_not_waited_for(exporter: Exporter) -> None:
    release = threading.Event()

    def drip(path: str) -> tuple[int, str]:
        release.wait(20)
        return 200, DCGM % (1, 1)

    exporter.says = drip
    meter = behind(exporter)
    assert meter.joules() is None
    release.set()
    exporter.says = lambda path: (200, DCGM % (1, 1))
    assert meter.joules() is not None
    exporter.server.shutdown()
    exporter.server.server_close()
    assert meter.joules() is None


def test_replicas_of_one_machine_share_a_page(
    exporter: Exporter, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prometheus, "_FRESH_S", 60.0)
    exporter.says = lambda path: (200, DCGM % (1, 1))
    energy = Energy(lambda *_: None, lambda _: 0)
    try:
        for device in range(2):
            one = settings(kind="prometheus", url=f"{exporter.url}/metrics", devices=[device])
            assert energy.open(one, "pool gpu").joules() is not None
    finally:
        energy.close()
    assert len(exporter.seen) == 1


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"url": "ftp://h/metrics"}, "meter.url 'ftp://h/metrics' is no http or https URL"),
        ({"url": "http://h/metrics", "query": "sum(x)"}, "is no metric's name"),
        ({"url": "http://h/metrics", "query": "x{a=1}"}, "is no label"),
        ({"url": "http://h/metrics", "query": 'x_joules{a=~"("}'}, "meter.query"),
        ({"url": "http://h/metrics", "query": "node_power"}, "the unit of node_power is not known"),
        ({"url": "http://h", "query": "sum(x_watts)"}, "is no metric's name"),
        ({"url": "http://h", "key_env": "NOT_SET_ANYWHERE"}, "NOT_SET_ANYWHERE is not set"),
    ],
)
def test_a_meter_that_can_never_work_is_refused_at_the_start(
    values: dict[str, Any], says: str
) -> None:
    with pytest.raises(UserError, match=re.escape(says)) as caught:
        Prometheus(settings(kind="prometheus", **values), "pool gpu", {})
    assert caught.value.message.startswith("pool gpu: ")
    assert caught.value.remedy


LABELS = {"gpu": "0", "pod": "a", "host": "h1"}


@pytest.mark.parametrize(
    ("query", "does"),
    [
        ("x", True),
        ("x{}", True),
        ('x{gpu="0"}', True),
        ('x{gpu="1"}', False),
        (' x { gpu = "0" , pod != "b", } ', True),
        ('x{pod=~"a|b",host!~"h[2-9]"}', True),
        ('x{pod=~"b"}', False),
        ('x{host=~"h"}', False),  # Prometheus' patterns match the whole
        ('x{nothing=""}', True),
        ('x{nothing!=""}', False),
    ],
)
def test_selectors_match_as_prometheus_does(query: str, does: bool) -> None:
    assert Selector(query).matches(LABELS) is does


# All of them


class Read(Modelled):
    """A meter whose readings the test gives."""

    grade: Grade = "measured"


def test_energy_adds_up_what_a_request_took_at_each_replica() -> None:
    told: dict[str, tuple[float, str]] = {}
    now = [0]
    energy = Energy(
        lambda ident, joules, grade: told.update({ident: (joules, grade)}),
        lambda _: 0,
        lambda: now[0],
    )
    try:
        for replica in range(2):
            energy.add(replica, Read(), idle_w=0.0)
            energy.read(replica, 0.0)
        energy.began(0, "moved", 10.0, 1.0, 0)
        energy.left(0, "moved", 10, S)
        energy.began(1, "moved", 5.0, 1.0, S, tokens=10)
        assert energy.ended(1, "moved", 20, S) == (35.0, "modelled")
        energy.began(0, "stayed", 10.0, 1.0, 0)
        assert energy.ended(0, "stayed", 10, S) == (20.0, "modelled")
        assert energy.ended(None, "refused", 0, S) == (0.0, "")
        now[0] = 2 * S
        energy.read(0, 80.0)
        assert told == {"stayed": (40.0, "measured")}
        energy.read(1, 30.0)
        assert told["moved"] == (70.0, "measured")
        # One that waits for another replica and whose client leaves meanwhile.
        energy.began(0, "left", 10.0, 1.0, now[0])
        energy.left(0, "left", 10, now[0])
        energy.read(0, 180.0)
        assert energy.ended(None, "left", 10, now[0]) == (100.0, "measured")
        # A replica that is taken out of the fleet.
        energy.began(1, "last", 10.0, 1.0, now[0])
        assert energy.ended(1, "last", 10, now[0])[1] == "modelled"
        energy.began(1, "stranded", 10.0, 1.0, now[0])
        energy.remove(1)
        assert "stranded" not in told
        assert energy.ended(1, "stranded", 0, now[0])[1] == "modelled"
        assert [replica for replica, _, _ in energy.totals()] == [0]
        assert not energy._moved
    finally:
        energy.close()


def test_a_figure_that_does_not_change_is_not_told_again() -> None:
    told: list[str] = []
    energy = Energy(lambda ident, *_: told.append(ident), lambda _: 3)
    try:
        energy.add(0, Modelled(), idle_w=70.0)
        for ident in "abc":
            energy.began(0, ident, 1.5, 0.25, time.monotonic_ns())
        energy.read(0, None)
        for ident in "abc":
            energy.ended(0, ident, 9, time.monotonic_ns())
        energy.read(0, None)
    finally:
        energy.close()
    assert told == []
    (_, totals, _) = next(energy.totals())
    assert totals.attributed_nj == round(3 * (1.5 + 9 * 0.25) * NJ_PER_J)


def test_meters_are_read_beside_the_loop_and_receipts_are_the_meter(
    exporter: Exporter, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(energy_module, "_EVERY_S", 0.01)
    reads = [0]

    def says(path: str) -> tuple[int, str]:
        reads[0] += 1
        return 200, DCGM % (reads[0] * 1000, reads[0] * 2000)

    exporter.says = says
    finals: dict[str, tuple[float, str]] = {}
    energy = Energy(
        lambda ident, joules, grade: finals.update({ident: (joules, grade)}), lambda _: 1
    )

    async def serve() -> None:
        meter = settings(kind="prometheus", url=f"{exporter.url}/metrics")
        energy.add(0, energy.open(meter, "pool gpu"), idle_w=0.0)
        energy.add(1, energy.open(settings(), "pool two"), idle_w=5.0)
        task = asyncio.create_task(energy.run())
        while reads[0] < 3:
            await asyncio.sleep(0.01)
        for number in range(30):
            ident, replica = str(number), number % 2
            energy.began(replica, ident, 0.5, 0.01, time.monotonic_ns())
            await asyncio.sleep(0.002)
            energy.ended(replica, ident, 20, time.monotonic_ns())
        while len(finals) < 15:
            await asyncio.sleep(0.01)
        task.cancel()
        energy.close()

    asyncio.run(asyncio.wait_for(serve(), 30))
    ((_, sums, _), _) = energy.totals()
    assert {ident for ident in finals if int(ident) % 2 == 0} == {str(n) for n in range(0, 30, 2)}
    assert {grade for _, grade in finals.values()} == {"measured"}
    assert sum(joules for joules, _ in finals.values()) == pytest.approx(sums.attributed_nj * 1e-9)
    assert sums.attributed_nj + sums.idle_nj + sums.unattributed_nj == sums.meter_nj
    assert sums.measured_nj > 0
    answers = sums.measured_nj / (3 * NJ_PER_J)
    assert answers == pytest.approx(round(answers), abs=1e-6)


def test_without_a_gpu_meter_no_vendors_library_is_loaded() -> None:
    code = (
        "import sys, tokenworks.gateway.energy.energy;"
        "sys.exit(any(name in sys.modules for name in ('pynvml', 'amdsmi', 'torch')))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
