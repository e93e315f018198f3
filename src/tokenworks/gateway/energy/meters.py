"""What a replica's devices have drawn, as hardware counts it: NVIDIA, AMD, the host's processors.

Meters behind an address are in `prometheus`. A reading may block: it is done in a thread. Trouble
after the start is told once, and the figures are modelled meanwhile.
"""

import importlib
import logging
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final, Literal, Protocol

import msgspec
from msgspec.structs import replace

from tokenworks.errors import UserError
from tokenworks.units import NS_PER_S

_log = logging.getLogger(__name__)

Grade = Literal["measured", "modelled"]
Unit = Literal["J", "mJ", "uJ", "W", "mW"]
_HOST: Final = "{host}"
_POWERCAP: Final = Path("/sys/class/powercap")


class MeterSettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`meter` of a pool: where its replicas' joules are read.

    `devices`: indices or UUIDs, shared out evenly between the pool's replicas. `url`: of kind
    prometheus, an exporter's page (its path ends in /metrics) or a Prometheus server; {host} in it
    is each replica's own. `query`: which metric there, or for a server any PromQL. `unit`: of what
    it gives, where the metric's name doesn't say. `key_env`: the environment variable that holds
    the address's bearer token.
    """

    kind: Literal["modelled", "nvml", "amd", "rapl", "prometheus"] = "modelled"
    devices: tuple[int | str, ...] = ()
    url: str = ""
    query: str = "DCGM_FI_DEV_TOTAL_ENERGY_CONSUMPTION"
    unit: Unit | None = None
    key_env: str = ""

    def __post_init__(self) -> None:
        if self.kind == "prometheus" and not self.url:
            raise ValueError("a prometheus meter needs the url of an exporter or a server")
        if self.kind != "prometheus" and (self.url or self.unit or self.key_env):
            raise ValueError("url, unit and key_env are of prometheus meters only")
        if self.kind in ("nvml", "amd") and not self.devices:
            raise ValueError(f"meter {self.kind} needs devices: the indices or UUIDs of its GPUs")
        if any(isinstance(device, int) and device < 0 for device in self.devices):
            raise ValueError("devices are counted from 0")
        if self.kind == "rapl" and any(isinstance(device, str) for device in self.devices):
            raise ValueError("devices of a rapl meter are the numbers of processor packages")

    def of_replica(self, number: int, replicas: int, host: str, pool: str) -> "MeterSettings":
        """Of one of a pool's `replicas` at `host`; UserError where they can't be told apart."""
        if self.kind == "modelled":
            return self
        place = {"url": self.url.replace(_HOST, host), "query": self.query.replace(_HOST, host)}
        mine = replace(self, **place)
        if replicas == 1 or mine != self:
            return mine
        each, left = divmod(len(self.devices), replicas)
        if left or not each:
            raise UserError(
                f"pool {pool}: its meter can't tell {replicas} replicas apart by "
                f"{len(self.devices)} devices",
                "Give as many devices to each, or a pool of its own to each replica.",
            )
        own = self.devices[number * each : (number + 1) * each]
        return replace(self, devices=own)


class Meter(Protocol):
    """One replica's. `grade`: modelled if it never reads anything."""

    grade: Grade

    def joules(self) -> float | None:
        """Cumulative, from any beginning; None where nothing (new) can be read. Never raises."""


class Modelled:
    """No meter: joules are what the model says."""

    grade: Grade = "modelled"

    def joules(self) -> float | None:
        """Nothing."""
        return None


class Voice:
    """Says once that a meter can't be read, and once that it can be again."""

    def __init__(self, place: str) -> None:
        self.place, self._is_bad = place, False

    def bad(self, why: str) -> None:
        """It can't be read."""
        if not self._is_bad:
            _log.warning("%s: %s; joules are modelled until it can be read", self.place, why)
        self._is_bad = True

    def good(self) -> None:
        """It was read."""
        if self._is_bad:
            _log.info("%s can be read again", self.place)
        self._is_bad = False


class Integral:
    """Watts to joules: between two readings they are taken as the mean of both."""

    def __init__(self, now_ns: Callable[[], int] = time.monotonic_ns) -> None:
        self._now_ns = now_ns
        self._before: tuple[int, float] | None = None
        self._joules = 0.0

    def add(self, watts: float) -> float:
        """It draws so much now: joules since the first reading."""
        now_ns = self._now_ns()
        if self._before is not None:
            then_ns, then_w = self._before
            self._joules += (watts + then_w) / 2 * (now_ns - then_ns) / NS_PER_S
        self._before = now_ns, watts
        return self._joules


def _library(name: str, kind: str, place: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError:
        raise UserError(
            f"{place}: meter {kind} needs the library {name}",
            "`pip install 'tokenworks[energy]'`, or set meter.kind to modelled.",
        ) from None
    except Exception as error:  # amdsmi looks for ROCm while it is imported, and raises whatever
        raise UserError(
            f"{place}: the library {name} can't be loaded: {error!r}",
            "It needs the vendor's driver; for AMD, the amdsmi that came with this ROCm.",
        ) from None


class Devices:
    """Devices of this machine: their `energy_j` counter, or where it is refused `watts` over time.

    Raises what these raise if it can read neither.
    """

    grade: Grade = "measured"

    def __init__(
        self,
        place: str,
        energy_j: Callable[[], float],
        watts: Callable[[], float],
        errors: type[Exception],
    ) -> None:
        self._energy_j, self._watts, self._errors = energy_j, watts, errors
        self._voice = Voice(f"{place}: its devices")
        self._last_j = -1.0
        self._integral: Integral | None = None
        try:
            energy_j()
        except errors:
            watts()
            self._integral = Integral()

    def joules(self) -> float | None:
        """Of all of them."""
        try:
            if self._integral is None:
                found = self._energy_j()
            else:
                found = self._integral.add(self._watts())
        except self._errors as error:
            self._voice.bad(str(error))
            return None
        self._voice.good()
        last, self._last_j = self._last_j, found
        return None if found == last else found  # a counter that stands still is no reading


def nvml(devices: Sequence[int | str], place: str) -> Devices:
    """NVIDIA GPUs: counters in millijoules since Volta, before that milliwatts."""
    library = _library("pynvml", "nvml", place)
    try:
        library.nvmlInit()
        handles = [
            library.nvmlDeviceGetHandleByIndex(device)
            if isinstance(device, int)
            else library.nvmlDeviceGetHandleByUUID(device)
            for device in devices
        ]
        energy, power = (
            library.nvmlDeviceGetTotalEnergyConsumption,
            library.nvmlDeviceGetPowerUsage,
        )
        return Devices(
            place,
            lambda: sum(map(energy, handles)) * 1e-3,
            lambda: sum(map(power, handles)) * 1e-3,
            library.NVMLError,
        )
    except library.NVMLError as error:
        raise UserError(
            f"{place}: NVML can't read GPU {', '.join(map(str, devices))}: {error}",
            "Check meter.devices and the driver with `nvidia-smi -L`.",
        ) from None


def amd(devices: Sequence[int | str], place: str) -> Devices:
    """AMD GPUs: counters in units of their own; a virtual machine has only watts."""
    library = _library("amdsmi", "amd", place)

    def energy_j(handle: Any) -> float:
        read = library.amdsmi_get_energy_count(handle)
        microjoules: float = read["energy_accumulator"] * read["counter_resolution"]
        return microjoules * 1e-6

    def watts(handle: Any) -> float:
        read = library.amdsmi_get_power_info(handle)
        # Which of them is filled depends on the generation.
        names = ("current_socket_power", "average_socket_power", "socket_power")
        found = [read[name] for name in names if isinstance(read.get(name), int) and read[name]]
        if not found:
            raise library.AmdSmiException("no power is told")
        return float(found[0])

    try:
        library.amdsmi_init()
        there = library.amdsmi_get_processor_handles()
        names = {library.amdsmi_get_gpu_device_uuid(handle): handle for handle in there}
        handles = [there[each] if isinstance(each, int) else names[each] for each in devices]
        return Devices(
            place,
            lambda: sum(map(energy_j, handles)),
            lambda: sum(map(watts, handles)),
            library.AmdSmiException,
        )
    except (library.AmdSmiException, LookupError) as error:
        raise UserError(
            f"{place}: AMD SMI can't read GPU {', '.join(map(str, devices))}: {error!r}",
            "Check meter.devices and the driver with `amd-smi list`.",
        ) from None


class Rapl:
    """Processors of this machine with their memory: the counters that the kernel shows as files.

    They count all that runs there, not only the engine.
    """

    grade: Grade = "measured"

    def __init__(self, packages: Sequence[int | str], place: str, root: Path = _POWERCAP) -> None:
        numbers = packages or sorted(
            int(zone.name.partition(":")[2])
            for zone in root.glob("intel-rapl:*")
            if zone.name.count(":") == 1 and _name(zone).startswith("package")
        )
        self._zones = []
        for number in numbers:
            zone = root / f"intel-rapl:{number}"
            if not (zone / "energy_uj").exists():
                raise UserError(
                    f"{place}: there is no processor package {number} in {root}",
                    "`ls /sys/class/powercap` lists them; virtual machines have none.",
                )
            memory = (sub for sub in root.glob(f"{zone.name}:*") if _name(sub) == "dram")
            self._zones += [_Zone(zone), *map(_Zone, memory)]
        if not self._zones:
            raise UserError(
                f"{place}: this machine shows no energy counters in {root}",
                "Virtual machines have none: set meter.kind to modelled.",
            )
        self._voice = Voice(f"{place}: the processor's energy counters")

    def joules(self) -> float | None:
        """Of all packages, since the first reading."""
        try:
            microjoules = sum(zone.read() for zone in self._zones)
        except PermissionError as error:
            self._voice.bad(f"{error.filename} may be read by root only: `chmod a+r` it at boot")
            return None
        except (OSError, ValueError) as error:
            self._voice.bad(str(error))
            return None
        self._voice.good()
        return microjoules * 1e-6


class _Zone:
    """A counter of microjoules that begins anew after its range."""

    def __init__(self, folder: Path) -> None:
        self._file, self._range_file = folder / "energy_uj", folder / "max_energy_range_uj"
        self._last: int | None = None
        self._total = 0

    def read(self) -> int:
        """Microjoules since the first reading; it must be read once per range (minutes)."""
        now = int(self._file.read_text())
        if self._last is not None:
            if now < self._last:
                self._total += int(self._range_file.read_text())
            self._total += now - self._last
        self._last = now
        return self._total


def _name(zone: Path) -> str:
    try:
        return (zone / "name").read_text().strip()
    except OSError:
        return ""
