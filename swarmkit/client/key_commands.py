"""Commands that print a key. They stand in the user's own settings file, and a hostfile can only name them."""

from __future__ import annotations

import os
import subprocess
import tomllib
from pathlib import Path

from ..errors import SettingError

__all__ = ["key_from_command", "settings_file"]

_LONGEST_S = 60.0


def settings_file() -> Path:
    """``swarmkit/settings.toml`` in ``$XDG_CONFIG_HOME``, which is ``~/.config`` where it is not set."""
    folder = os.environ.get("XDG_CONFIG_HOME", "")
    return (Path(folder) if os.path.isabs(folder) else Path.home() / ".config") / "swarmkit" / "settings.toml"


def key_from_command(name: str) -> str:
    """Run a command of the section ``[key_commands]``, without a shell; what it prints is the key.

    Raises
    ------
    SettingError
        There is no such command, or it fails. Nothing that it prints is shown.
    """
    file = settings_file()
    write = f'write {name} = ["program", "argument"] below [key_commands] in {file}'
    try:
        commands = tomllib.loads(file.read_text(encoding="utf-8-sig")).get("key_commands", {})
    except FileNotFoundError:
        raise SettingError(f"is not known, since there is no {file}: {write}") from None
    except (OSError, ValueError) as exc:
        kind = "is not TOML" if isinstance(exc, ValueError) else f"cannot be read: {type(exc).__name__}"
        raise SettingError(f"is not known, since {file} {kind}") from None
    words = commands.get(name) if isinstance(commands, dict) else None
    if not (isinstance(words, list) and words and all(isinstance(word, str) for word in words)):
        raise SettingError(f"is not known: {write}")
    try:
        done = subprocess.run(words, stdin=subprocess.DEVNULL, capture_output=True, timeout=_LONGEST_S, check=False)
    except subprocess.TimeoutExpired:
        raise SettingError(f"did not end within {_LONGEST_S:g} s: run it by hand to see why") from None
    except OSError as exc:
        raise SettingError(f"cannot be run: {os.strerror(exc.errno) if exc.errno else type(exc).__name__}") from None
    if done.returncode:
        raise SettingError(f"ended with exit code {done.returncode}: run it by hand to see why")
    return done.stdout.decode("ascii", "replace").strip()
