"""Whether what would be published works: ``python tests/wheel/check_wheels.py --need 3.11 3.12 3.13``.

Builds the sdist, and the wheel from it; checks both (``twine check``, ``check-wheel-contents``); installs the wheel
into a fresh environment for each Python that the machine has, and runs the default tests of frames and faults there
with the newest pandas, and those of frames with the oldest. The tests are those of the sdist, in a folder without
``swarmkit/``, so that nothing but the wheel can be imported. Fails where a Python of ``--need`` is missing.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
import tomllib
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
PYTHONS = ("3.11", "3.12", "3.13", "3.14")
OLDEST = {"3.14": "pandas==2.3.*"}  # the first with wheels for it
FRAMES, FAULTS = "tests/test_frames.py", "tests/test_faults.py"  # faults know nothing of pandas
# Not needed by these tests, and large: the real models, the notebooks, dask.
LEFT_OUT = ("openvino", "wordllama", "safetensors", "tokenizers", "nbval", "ipykernel", "swarmkit-frames")


def run(*command: str | Path, cwd: Path = ROOT) -> str:
    """The output of a command; what it said, and the end of this script, if it fails."""
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    done = subprocess.run(
        [str(part) for part in command], cwd=cwd, env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    if done.returncode:
        raise SystemExit(f"{' '.join(map(str, command))} failed:\n{done.stdout[-6000:]}")
    return done.stdout


def find(version: str) -> Path | None:
    """A Python of that version: on the path, or of pyenv."""
    found = [shutil.which(f"python{version}")]
    found += sorted(map(str, Path.home().glob(f".pyenv/versions/{version}.*/bin/python")))
    for path in filter(None, found):  # pyenv leaves stubs on the path that run nothing
        asked = [path, "-c", "import ensurepip, sys; print('%d.%d' % sys.version_info[:2])"]
        done = subprocess.run(asked, capture_output=True, text=True)
        if done.returncode == 0 and done.stdout.strip() == version:
            return Path(path)
    return None


def requirements() -> list[str]:
    """What the tests need beside the wheel."""
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    lines = [line for name in ("local", "parquet", "test") for line in extras[name]]
    return [line for line in lines if not line.startswith(LEFT_OUT)]


def build(folder: Path) -> tuple[Path, Path]:
    """The wheel, and a folder with the tests of the sdist."""
    run(sys.executable, "-m", "venv", folder / "tools")
    python = folder / "tools/bin/python"
    run(python, "-m", "pip", "install", "-q", "build", "twine", "check-wheel-contents")
    run(python, "-m", "build", "--outdir", folder / "dist", ROOT)
    (sdist,), (wheel,) = (folder / "dist").glob("*.tar.gz"), (folder / "dist").glob("*.whl")
    run(python, "-m", "twine", "check", "--strict", sdist, wheel)
    run(folder / "tools/bin/check-wheel-contents", wheel)
    with tarfile.open(sdist) as archive:
        archive.extractall(folder / "sdist", filter="data")
    (unpacked,) = (folder / "sdist").iterdir()
    shutil.rmtree(unpacked / "swarmkit")
    print(f"{sdist.name}, {wheel.name}: checked", flush=True)
    return wheel, unpacked


def check(version: str, python: Path, folder: Path, wheel: Path, tests: Path, newest: tuple[str, ...]) -> None:
    """Run the tests on one Python, with two versions of pandas."""
    begun = time.monotonic()
    home = folder / version
    run(python, "-m", "venv", "--without-pip", home)
    here = home / "bin/python"
    pip = (folder / "tools/bin/python", "-m", "pip", "--python", here, "install", "-q", "--no-compile")
    run(*pip, wheel, *requirements())
    for pandas, files in (("pandas", newest), (OLDEST.get(version, "pandas==2.2.*"), (FRAMES,))):
        run(*pip, "--only-binary=:all:", pandas)
        words = "import swarmkit, pandas; print(swarmkit.__version__, swarmkit.__path__[0], pandas.__version__)"
        release, path, installed = run(here, "-c", words, cwd=tests).split()
        if not Path(path).is_relative_to(home) or f"-{release}-" not in wheel.name:
            raise SystemExit(f"swarmkit {release} of {path} was imported, not that of {wheel.name}")
        plain = ["-o", "addopts=", "-n3", "--dist=loadfile", "-q", "-p", "no:cacheprovider"]
        plain += ["-m", "not long and not slow"]
        last = run(here, "-m", "pytest", *plain, *files, cwd=tests).strip().splitlines()[-1]
        print(f"Python {version}, pandas {installed}: {last}", flush=True)
    run(home / "bin/swarmkit", "--version", cwd=tests)
    print(f"Python {version}: {time.monotonic() - begun:.0f} s", flush=True)


def main() -> None:
    """Build, check, install, test."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--need", nargs="*", default=[], metavar="VERSION", help="Pythons that must be there")
    parser.add_argument("--only", nargs="*", default=PYTHONS, metavar="VERSION", help="Pythons to use; else all")
    parser.add_argument("--frames", action="store_true", help="the tests of frames only")
    arguments = parser.parse_args()
    newest = (FRAMES,) if arguments.frames else (FRAMES, FAULTS)
    pythons = {version: path for version in arguments.only if (path := find(version))}
    if missing := set(arguments.need) - set(pythons):
        raise SystemExit(f"Python {', '.join(sorted(missing))} is needed, and there is {', '.join(pythons) or 'none'}")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        wheel, tests = build(folder)
        for version, path in pythons.items():  # not side by side: servers of these tests are silent for 0.4 s
            check(version, path, folder, wheel, tests, newest)


if __name__ == "__main__":
    main()
