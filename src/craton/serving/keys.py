"""API keys: random, shown once, kept as salted hashes, compared in constant time."""

from __future__ import annotations

import datetime
import hashlib
import hmac
import json
import os
import secrets
from dataclasses import dataclass
from pathlib import Path

from pydantic import Field, ValidationError

from craton.checkpoints.disk import replace_file
from craton.config import Settings
from craton.errors import FileFormatError, UnknownName, UsageError

PREFIX = "craton-"
MOST_PRIORITY = 100


class StoredKey(Settings):
    """A key as the file holds it. A key is 256 random bits, so one round of SHA-256 is as good as a slow hash.

    priority: the higher is answered first. admin: may load and unload models.
    """

    name: str = Field(pattern=r"^[A-Za-z0-9._-]{1,64}$")
    salt: str = Field(pattern=r"^[0-9a-f]{32}$")
    hash: str = Field(pattern=r"^[0-9a-f]{64}$")
    created: str
    priority: int = Field(0, ge=-MOST_PRIORITY, le=MOST_PRIORITY)
    admin: bool = False


@dataclass(frozen=True)
class Caller:
    """Who asks: a key's name, rank and rights. salt: callers of different salts share nothing of what a model read."""

    name: str
    salt: str = ""
    priority: int = 0
    admin: bool = False


ANYONE = Caller("anyone")


class _KeyTable(Settings):
    keys: tuple[StoredKey, ...] = ()


class KeyFile:
    """A file of hashed keys. A running server reads it again when it has changed."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._seen: tuple[int, int] | None = None
        self._keys: tuple[StoredKey, ...] = ()

    def keys(self) -> tuple[StoredKey, ...]:
        """The keys as they stand in the file. Raises UsageError or FileFormatError where it cannot be read."""
        try:
            stat = self.path.stat()
        except OSError as error:
            raise UsageError(
                f"the key file cannot be read: {error.strerror}",
                where=str(self.path),
                remedy=f"craton serve key add NAME --api-key-file {self.path}",
            ) from None
        if self._seen != (stat.st_mtime_ns, stat.st_size):
            self._keys, self._seen = _read(self.path), (stat.st_mtime_ns, stat.st_size)
        return self._keys

    def caller_of(self, presented: str) -> Caller | None:
        """Whose key was presented; None for a wrong one. Takes the same time for any wrong key."""
        found = None
        for key in self.keys():
            if hmac.compare_digest(_hash(key.salt, presented), key.hash):
                found = Caller(key.name, key.hash, key.priority, key.admin)
        return found

    def add(self, name: str, *, priority: int = 0, admin: bool = False) -> str:
        """Make a key; gives its text, which is nowhere else. Raises UsageError for a name that is taken."""
        keys = self.keys() if self.path.exists() else ()
        if any(key.name == name for key in keys):
            raise UsageError(f"there is a key {name!r} already", where=str(self.path), remedy="choose another name")
        text, salt = PREFIX + secrets.token_urlsafe(32), secrets.token_hex(16)
        created = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        if abs(priority) > MOST_PRIORITY:
            raise UsageError(f"a priority is between -{MOST_PRIORITY} and {MOST_PRIORITY}, not {priority}")
        try:
            added = StoredKey(
                name=name, salt=salt, hash=_hash(salt, text), created=created, priority=priority, admin=admin
            )
        except ValidationError:
            raise UsageError(f"{name!r} is no name for a key", remedy="letters, digits, '.', '_', '-'") from None
        self._write((*keys, added))
        return text

    def remove(self, name: str) -> None:
        """Forget a key. Raises UnknownName."""
        keys = self.keys()
        if all(key.name != name for key in keys):
            raise UnknownName("key", name, [key.name for key in keys], where=str(self.path))
        self._write(tuple(key for key in keys if key.name != name))

    def _write(self, keys: tuple[StoredKey, ...]) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        replace_file(self.path, (_KeyTable(keys=keys).model_dump_json(indent=2) + "\n").encode())
        os.chmod(self.path, 0o600)
        self._seen = None


def _hash(salt: str, text: str) -> str:
    return hashlib.sha256(bytes.fromhex(salt) + text.encode(errors="surrogatepass")).hexdigest()


def _read(path: Path) -> tuple[StoredKey, ...]:
    try:
        return _KeyTable.model_validate(json.loads(path.read_bytes())).keys
    except (ValueError, RecursionError):  # ValidationError is a ValueError
        raise FileFormatError("this is no file of keys", where=str(path)) from None
