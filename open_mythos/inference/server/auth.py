"""API keys: kept as hashes, compared in constant time."""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
from pathlib import Path

from open_mythos.errors import ConfigError, DataError
from open_mythos.files import read_text

MOST_KEY_BYTES = 1 << 20


class Keys:
    """The accepted keys; none means that everybody is let in.

    Args:
        keys: The keys; only their SHA-256 is kept.
    """

    def __init__(self, keys: list[str]) -> None:
        self._digests = [hashlib.sha256(key.encode()).digest() for key in keys]

    @classmethod
    def read(cls, path: str) -> Keys:
        """Read a file of one key per line; empty lines and lines that begin with # are skipped.

        Raises:
            DataError: The file cannot be read or holds no key.
        """
        try:
            lines = read_text(Path(path), MOST_KEY_BYTES).splitlines()
        except (OSError, ValueError) as error:
            raise DataError(
                "the API keys cannot be read", where=path, value=type(error).__name__,
                allowed="a readable file",
                fix="check the path and permissions of --api-key-file",
            ) from error  # fmt: skip
        keys = [word for line in lines if (word := line.strip()) and not word.startswith("#")]
        if not keys:
            raise DataError(
                "the file holds no API key", where=path, value="",
                allowed="one key per line",
                fix="write a long random key into it",
            )  # fmt: skip
        return cls(keys)

    def __bool__(self) -> bool:
        return bool(self._digests)

    def __len__(self) -> int:
        return len(self._digests)

    def name_of(self, authorization: bytes) -> str | None:
        """Return a name for the key of an ``Authorization`` header; None if it is not accepted.

        The name is the beginning of the key's hash, and "" where no keys are set.
        """
        if not self._digests:
            return ""
        scheme, _, key = authorization.partition(b" ")
        digest = hashlib.sha256(key.strip()).digest()
        # all of them, so that the time does not tell which one matched
        matches = [hmac.compare_digest(digest, each) for each in self._digests]
        return digest.hex()[:16] if any(matches) and scheme.lower() == b"bearer" else None


def is_own_name(header: bytes, host: str) -> bool:
    """Whether a ``Host`` header names this server, which listens on ``host``.

    A page of another site may have its own name lead here (DNS rebinding): its browser then sends
    requests as if to that site, with its name. Addresses cannot be rebound.
    """
    text = header.decode("latin-1").strip().lower()
    name = text.rpartition(":")[0] if text.rpartition(":")[2].isdecimal() else text
    if name in (host.lower(), "localhost") or name.endswith(".localhost"):
        return True
    return _address(name.removeprefix("[").removesuffix("]")) is not None


def _address(text: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    try:
        return ipaddress.ip_address(text)
    except ValueError:
        return None


def check_address(host: str, keys: Keys, insecure: bool) -> None:
    """Refuse to listen beyond this machine without keys.

    Raises:
        ConfigError: ``host`` is not a loopback address, there are no keys, and ``insecure`` is not
            set.
    """
    if keys or insecure or host == "localhost":
        return
    address = _address(host)
    if address is None or not address.is_loopback:
        raise ConfigError(
            "a server that other machines can reach needs API keys", where="--host", value=host,
            allowed="127.0.0.1, or --api-key-file FILE",
            fix="set --api-key-file, or --insecure if a proxy in front checks keys",
        )  # fmt: skip
