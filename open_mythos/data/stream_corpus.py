"""A corpus: files on this machine, on the Hugging Face hub or wherever fsspec reaches.

Opening a corpus lists names and sizes and reads no file, so terabytes open in the time of a
listing. Files are read in units: a part of a Parquet file (whole row groups if there are enough of
them), of a JSONL file (whole lines) or of a text (whole pieces).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from open_mythos.data.sources import (
    KINDS,
    STDLIB,
    TEXT_PIECE_BYTES,
    find_files,
    stdlib_modules,
)
from open_mythos.errors import ConfigError, DataError, EnvironmentError_

FINEWEB_EDU = "HuggingFaceFW/fineweb-edu"
FINEWEB_EDU_FOLDERS = {
    "sample-10BT": "sample/10BT", "sample-100BT": "sample/100BT", "sample-350BT": "sample/350BT",
    "default": "data",
}  # fmt: skip
"""Subset of FineWeb-Edu -> its folder in the dataset's repository."""

# Units per lane and epoch, if files are large enough: several, so that lanes get equal amounts and
# the order is mixed; few, because opening one reads a Parquet footer.
UNITS_PER_LANE = 8
MAX_UNIT_BYTES = 1 << 26
MIN_UNIT_BYTES = 1 << 8
_SAMPLED_BYTES = 1 << 12
_HUB = "hf://datasets/"
_HUB_TIMEOUT_S = 10.0
_HUB_FIX = (
    "check the network (behind a mirror set HF_ENDPOINT), or download the files once with "
    "`hf download NAME --repo-type dataset --local-dir FOLDER` and name FOLDER as the source"
)


class Unit(NamedTuple):
    """Part ``part`` of ``parts`` equal parts of a file."""

    file: int
    """Number of the file in its corpus."""
    part: int
    parts: int


@dataclass(frozen=True)
class CorpusFile:
    """A file of a corpus."""

    name: str
    """Its path below the corpus' root, with ``/``."""
    size: int
    """Bytes."""
    digest: str
    """What the hub or the store knows its content by; else a hash of its first and last 4 KiB."""


@dataclass(frozen=True)
class Corpus:
    """Files of text; :func:`open_corpus` makes one."""

    source: str
    """The argument of :func:`open_corpus`."""
    protocol: str
    """The fsspec file system: "file", "hf", "memory", "s3", ..."""
    root: str
    """The folder that all names start from."""
    files: tuple[CorpusFile, ...]
    text_field: str
    """JSON key or Parquet column of the text."""

    @property
    def size(self) -> int:
        """Bytes of all files."""
        return sum(file.size for file in self.files)

    @cached_property
    def fingerprint(self) -> str:
        """64 hex digits: equal for the same files, wherever they lie."""
        content = [self.text_field, [(file.name, file.size, file.digest) for file in self.files]]
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()

    def path(self, file: int) -> str:
        """Return the path of a file within its file system."""
        return f"{self.root}/{self.files[file].name}"

    def suffix(self, file: int) -> str:
        """Return the kind of a file: ".parquet", ...; "stdlib" for Python's modules."""
        return STDLIB if self.source == STDLIB else PurePosixPath(self.files[file].name).suffix

    def units(self, lanes: int) -> list[Unit]:
        """Divide all files so finely that ``lanes`` readers have several units each."""
        wanted = -(-self.size // (lanes * UNITS_PER_LANE))
        unit_bytes = min(MAX_UNIT_BYTES, max(MIN_UNIT_BYTES, wanted))
        return [
            Unit(number, part, parts)
            for number, file in enumerate(self.files)
            for parts in [min(-(-file.size // unit_bytes), self._most_parts(number))]
            for part in range(parts)
        ]

    def unit_size(self, unit: Unit) -> int:
        """Return the bytes of a unit, its share of the file."""
        size = self.files[unit.file].size
        return size * (unit.part + 1) // unit.parts - size * unit.part // unit.parts

    def to_json(self) -> str:
        """Serialise the corpus for other processes."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Corpus:
        """The inverse of :meth:`to_json`."""
        values = json.loads(text)
        files = tuple(CorpusFile(**file) for file in values.pop("files"))
        return cls(files=files, **values)

    def _most_parts(self, number: int) -> int:
        suffix, size = self.suffix(number).lower(), self.files[number].size
        if suffix == STDLIB:
            return 1
        return size if suffix in (".parquet", ".jsonl") else text_pieces(size)


def text_pieces(size: int) -> int:
    """Return how many documents a text file of ``size`` bytes is cut into, empty ones counted."""
    return -(-size // TEXT_PIECE_BYTES)


def fineweb_edu(subset: str = "sample-10BT") -> str:
    """Return the source of a subset of FineWeb-Edu (arXiv 2406.17557) on the Hugging Face hub.

    Raises:
        ConfigError: There is no such subset.
    """
    if subset not in FINEWEB_EDU_FOLDERS:
        raise ConfigError(
            "no such subset of FineWeb-Edu", where="subset", value=subset,
            allowed=", ".join(FINEWEB_EDU_FOLDERS),
        )  # fmt: skip
    return f"{_HUB}{FINEWEB_EDU}/{FINEWEB_EDU_FOLDERS[subset]}"


def open_corpus(source: str | Path, text_field: str = "text") -> Corpus:
    """List the files of ``source``.

    Args:
        source: ``"stdlib"``; a file; a folder, searched recursively without hidden files and linked
            folders; or the URL of one: ``hf://datasets/OWNER/NAME/FOLDER`` on the Hugging Face hub
            (``NAME@REVISION`` for another revision than main), ``s3://...``, whatever fsspec knows.
            A branch of the hub stands for the commit it points to now.
        text_field: The JSON key or Parquet column that holds the text.

    Raises:
        ConfigError: A file of an unknown kind.
        DataError: Nothing there, or an empty Parquet or JSONL file.
        EnvironmentError_: The hub or store cannot be reached, or its package is not installed.
    """
    if source == STDLIB:
        root, modules = stdlib_modules()
        return _local(STDLIB, root, modules, text_field)
    if "://" in str(source):
        return _remote(str(source), text_field)
    path = Path(source).expanduser()
    files = find_files(path)
    return _local(str(source), path if path.is_dir() else path.parent, files, text_field)


def _local(source: str, root: Path, paths: Iterable[Path], text_field: str) -> Corpus:
    files = []
    for path in paths:
        try:
            size, digest = path.stat().st_size, _sampled(path)
        except OSError as error:
            raise EnvironmentError_(
                "the file cannot be read", where=str(path), value=str(error)
            ) from error
        files.append(CorpusFile(path.relative_to(root).as_posix(), size, digest))
    return _corpus(source, "file", str(root.absolute()), files, text_field)


def _sampled(path: Path) -> str:
    """Hash the two ends of a file."""
    digest = hashlib.blake2b(digest_size=16)
    with path.open("rb") as stream:
        digest.update(stream.read(_SAMPLED_BYTES))
        stream.seek(max(0, path.stat().st_size - _SAMPLED_BYTES))
        digest.update(stream.read(_SAMPLED_BYTES))
    return digest.hexdigest()


def _remote(source: str, text_field: str) -> Corpus:
    url = _at_a_commit(source) if source.startswith(_HUB) else source
    try:
        from fsspec.core import url_to_fs

        system, root = url_to_fs(url)
        found: dict[str, dict[str, Any]] = system.find(root, detail=True)
    except ImportError as error:
        raise EnvironmentError_(
            "the file system's package is not installed", where="source", value=source,
            fix=f"pip install what fsspec asks for: {error}",
        ) from error  # fmt: skip
    except ValueError as error:
        raise ConfigError(
            "not a source", where="source", value=source, allowed=f"a path or URL: {error}"
        ) from error
    except FileNotFoundError:
        found = {}
    except Exception as error:  # every file system has errors of its own
        raise _unreachable(source, error) from error
    protocol = system.protocol if isinstance(system.protocol, str) else system.protocol[0]
    base = root if root not in found else root.rpartition("/")[0]
    files = [
        CorpusFile(name, int(info["size"]), _known_by(info))
        for path, info in sorted(found.items())
        for name in [path.removeprefix(base).lstrip("/")]
        if info.get("type", "file") == "file" and _is_read(name)
    ]
    if not files:
        raise DataError(
            "no file that can be read", where="source", value=source,
            allowed=", ".join(KINDS), fix="check owner, name and folder",
        )  # fmt: skip
    return _corpus(source, protocol, base, files, text_field)


def _at_a_commit(source: str) -> str:
    """Resolve the revision of a URL to its present commit, so that no later push changes it."""
    owner, name, *folders = [*source.removeprefix(_HUB).split("/"), ""]
    name, _, revision = name.partition("@")
    if not owner or not name:
        raise ConfigError(
            "not a dataset of the hub", where="source", value=source,
            allowed=f"{_HUB}OWNER/NAME, with a folder or file behind it if wanted",
        )  # fmt: skip
    try:
        from huggingface_hub import HfApi
        from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError
    except ImportError as error:
        raise EnvironmentError_(
            "reading from the hub needs huggingface_hub", where="source", value=source,
            fix="pip install open-mythos[data]",
        ) from error  # fmt: skip
    try:
        commit = HfApi().dataset_info(
            f"{owner}/{name}", revision=revision or None, timeout=_HUB_TIMEOUT_S
        ).sha  # fmt: skip
    except (RepositoryNotFoundError, RevisionNotFoundError) as error:
        raise DataError(
            "the hub has no such dataset or revision", where="source", value=source,
            fix="check owner, name and revision; for a private one log in with `hf auth login`",
        ) from error  # fmt: skip
    except Exception as error:  # the client raises its own, its transport's and OSError
        raise _unreachable(source, error) from error
    return f"{_HUB}{owner}/{name}@{commit}/{'/'.join(folders)}".rstrip("/")


def _unreachable(source: str, error: Exception) -> EnvironmentError_:
    reason = str(error).strip().splitlines() or [type(error).__name__]
    return EnvironmentError_(
        f"the corpus cannot be reached: {reason[0]}", where="source", value=source,
        allowed="a source that answers", fix=_HUB_FIX,
    )  # fmt: skip


def _is_read(name: str) -> bool:
    path = PurePosixPath(name)
    hidden = any(part.startswith(".") for part in path.parts)
    return path.suffix.lower() in KINDS and not hidden


def _known_by(info: dict[str, Any]) -> str:
    """Return the store's identifier of the content: a blob of the hub, or an entity tag."""
    known = (info.get(key) for key in ("blob_id", "ETag", "etag"))
    return next((str(each) for each in known if each), "")


def _corpus(
    source: str, protocol: str, root: str, files: list[CorpusFile], text_field: str
) -> Corpus:
    for file in files:
        if not file.size and PurePosixPath(file.name).suffix.lower() in (".parquet", ".jsonl"):
            raise DataError(
                "the file is empty", where=f"{root}/{file.name}, byte 0", value=0,
                allowed="one document or more", fix="fetch it again, or leave it out",
            )  # fmt: skip
    full = tuple(file for file in files if file.size)
    if not full:
        raise DataError("the source holds no text", where="source", value=source)
    return Corpus(source, protocol, root, full, text_field)
