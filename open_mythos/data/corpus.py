"""A corpus: text files on this machine, on the Hugging Face hub or wherever fsspec reaches.

Opening a corpus lists names and sizes and reads no document, so terabytes open as fast as they can
be listed. Files are read in units: a part of a Parquet file (whole row groups if there are enough
of them), of a JSONL file (whole lines) or of a text (whole pieces).
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import sysconfig
from collections import Counter
from collections.abc import Iterator, Set
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from open_mythos.checks import checked, pick
from open_mythos.errors import ConfigError, DataError, EnvironmentError_

logger = logging.getLogger(__name__)

KINDS: tuple[str, ...] = (".jsonl", ".md", ".parquet", ".py", ".txt")
"""Suffixes of the files that can be read."""
COMPRESSED = (".gz", ".zst", ".bz2", ".xz", ".lz4", ".zip")
_ABOUT = re.compile(r"(readme|licen[cs]e|notice|changelog|authors|contributing)(\.(md|txt))?", re.I)
"""Names of files about the data in a folder, which are no data."""
STDLIB = "stdlib"
# Tests of the standard library contain broken files on purpose; the others do not belong to it.
STDLIB_SKIPPED = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}
FINEWEB_EDU_FOLDERS = {
    "sample-10BT": "sample/10BT", "sample-100BT": "sample/100BT", "sample-350BT": "sample/350BT",
    "default": "data",
}  # fmt: skip
"""Subset of FineWeb-Edu -> its folder in the dataset's repository."""

# A longer text file is split at the next line end: this bounds memory and lets units split a file.
TEXT_PIECE_BYTES = 1 << 16
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
    """Index of the file in its corpus."""
    part: int
    parts: int

    def share(self, total: int) -> tuple[int, int]:
        """Return the unit's range (first, end) of the ``total`` bytes or items of the file."""
        return total * self.part // self.parts, total * (self.part + 1) // self.parts


@dataclass(frozen=True)
class CorpusFile:
    """A file of a corpus."""

    name: str
    """Path relative to the corpus' root, with ``/``."""
    size: int
    """Bytes."""
    digest: str
    """Content identifier of the hub or store; else a hash of the first and last 4 KiB."""


@dataclass(frozen=True)
class Corpus:
    """Files of text; :func:`open_corpus` builds one."""

    source: str
    """The argument of :func:`open_corpus`."""
    protocol: str
    """The fsspec file system: "file", "hf", "memory", "s3", ..."""
    root: str
    """The folder that all names are relative to."""
    files: tuple[CorpusFile, ...]
    text_field: str
    """JSON key or Parquet column of the text."""

    @property
    def size(self) -> int:
        """Bytes of all files."""
        return sum(file.size for file in self.files)

    @cached_property
    def fingerprint(self) -> str:
        """64 hex digits: equal for the same files in any location."""
        content = [self.text_field, [(file.name, file.size, file.digest) for file in self.files]]
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()

    def path(self, file: int) -> str:
        """Return the path of a file within its file system."""
        return f"{self.root}/{self.files[file].name}"

    def kind(self, file: int) -> str:
        """Return the suffix of a file in lower case; "stdlib" for a module of Python."""
        return STDLIB if self.source == STDLIB else _suffix(self.files[file].name)

    def units(self, lanes: int) -> list[Unit]:
        """Divide all files so finely that each of ``lanes`` readers gets several units."""
        wanted = -(-self.size // (lanes * UNITS_PER_LANE))
        unit_bytes = min(MAX_UNIT_BYTES, max(MIN_UNIT_BYTES, wanted))
        units = []
        for number, file in enumerate(self.files):
            kind, most = self.kind(number), file.size
            if kind not in (".parquet", ".jsonl"):
                most = 1 if kind == STDLIB else text_pieces(file.size)
            parts = min(-(-file.size // unit_bytes), most)
            units += [Unit(number, part, parts) for part in range(parts)]
        return units

    def unit_size(self, unit: Unit) -> int:
        """Return the bytes of a unit."""
        first, end = unit.share(self.files[unit.file].size)
        return end - first


def text_pieces(size: int) -> int:
    """Return how many documents a text file of ``size`` bytes is split into, with empty ones."""
    return -(-size // TEXT_PIECE_BYTES)


@checked
def fineweb_edu(subset: str = "sample-10BT") -> str:
    """Return the source of a subset of FineWeb-Edu (arXiv 2406.17557) on the Hugging Face hub.

    Raises:
        ConfigError: There is no such subset.
    """
    folder = pick(FINEWEB_EDU_FOLDERS, subset, "subset", what="subset of FineWeb-Edu")
    return f"{_HUB}HuggingFaceFW/fineweb-edu/{folder}"


@checked
def open_corpus(source: str | Path, text_field: str = "text", *, where: str = "source") -> Corpus:
    """List the files of ``source``.

    Args:
        source: ``"stdlib"``; a file; a folder, searched recursively without hidden files and linked
            folders; or the URL of one: ``hf://datasets/OWNER/NAME/FOLDER`` on the Hugging Face hub
            (``NAME@REVISION`` for another revision than main), ``s3://...`` or any other that
            fsspec knows. A branch of the hub is resolved to its current commit.
        text_field: The JSON key or Parquet column that holds the text.
        where: The option that names the source, for error messages.

    Raises:
        ConfigError: A file of an unknown kind.
        DataError: The source does not exist, has no readable file, or an empty Parquet or JSONL
            file.
        EnvironmentError_: The hub or store cannot be reached, or its package is not installed.
    """
    url = "://" in str(source)
    protocol, root, files = _remote(str(source), where) if url else _local(source, where)
    if not files:
        raise DataError(
            "no file that can be read", where=where, value=str(source),
            allowed=", ".join(KINDS), fix="check the name and the folder",
        )  # fmt: skip
    for file in files:
        if not file.size and _suffix(file.name) in (".parquet", ".jsonl"):
            raise DataError(
                "the file is empty", where=f"{root}/{file.name}, byte 0", value=0,
                allowed="at least one document", fix="download it again, or leave it out",
            )  # fmt: skip
    full = tuple(file for file in files if file.size)
    if not full:
        raise DataError(
            "the source holds no text",
            where=where,
            value=str(source),
            allowed="at least one file of text",
        )
    return Corpus(str(source), protocol, root, full, text_field)


def _suffix(name: str) -> str:
    return PurePosixPath(name).suffix.lower()


def _local(source: str | Path, where: str) -> tuple[str, str, list[CorpusFile]]:
    """Return the file system, the root and the files of a source on this machine."""
    path, kinds, skipped = Path(source).expanduser(), KINDS, set[str]()
    if source == STDLIB:
        path, kinds, skipped = Path(sysconfig.get_path("stdlib")), (".py",), STDLIB_SKIPPED
    if path.is_file():
        if _suffix(path.name) not in KINDS:
            raise ConfigError(
                "no reader for this kind of file", where=str(path), value=path.suffix,
                allowed=", ".join(KINDS), fix="decompress or rename it",
            )  # fmt: skip
        root, paths = path.parent, [path]
    elif path.is_dir():
        found = list(_walk(path, skipped))
        chosen = _readable([f.as_posix() for f in found], kinds, where, source)
        root, paths = path, [Path(name) for name in chosen]
    elif path.exists():
        raise DataError(
            "a pipe or a device is no source: a corpus is read several times", where=where,
            value=str(path), allowed="a regular file or a folder",
            fix="write it to a file first: zcat texts.jsonl.gz > texts.jsonl",
        )  # fmt: skip
    else:
        allowed = f'a file, a folder, or "{STDLIB}"'
        raise DataError("no such source", where=where, value=str(path), allowed=allowed)
    return "file", str(root.absolute()), [_local_file(root, path) for path in paths]


def _readable(
    names: list[str], kinds: tuple[str, ...], where: str, source: str | Path
) -> list[str]:
    """Return the data among the files of a folder; say what is passed over.

    Raises:
        DataError: A file of a known kind is only compressed.
    """
    chosen, about, left = list[str](), list[str](), Counter[str]()
    for name in names:
        path = PurePosixPath(name)
        if path.suffix.lower() in COMPRESSED and _suffix(path.stem) in KINDS and source != STDLIB:
            raise DataError(
                "a file of the folder is compressed", where=where, value=name,
                allowed=", ".join(KINDS), fix="decompress it, or leave it out of the folder",
            )  # fmt: skip
        if path.suffix.lower() not in kinds:
            left[path.suffix.lower() or path.name] += 1
        elif _ABOUT.fullmatch(path.name) and source != STDLIB:
            about.append(name)
        else:
            chosen.append(name)
    if not chosen:  # a folder of nothing else
        chosen = about
    else:
        left.update(PurePosixPath(name).name for name in about)
    if left and source != STDLIB:
        listed = ", ".join(f"{count} {kind}" for kind, count in left.most_common(8))
        logger.warning("%s: %d files are left out: %s", source, left.total(), listed)
    return chosen


def _walk(root: Path, skipped: Set[str]) -> Iterator[Path]:
    """Walk the visible files below ``root``, sorted by name, folder by folder."""
    for folder, folders, files in os.walk(root):
        folders[:] = sorted(f for f in folders if f not in skipped and not f.startswith("."))
        yield from (Path(folder, name) for name in sorted(files) if not name.startswith("."))


def _local_file(root: Path, path: Path) -> CorpusFile:
    if path.exists() and not path.is_file():  # to open it could wait for ever
        raise DataError(
            "not a regular file", where=str(path), value="a pipe or a device",
            allowed="regular files", fix="leave it out of the folder",
        )  # fmt: skip
    digest = hashlib.blake2b(digest_size=16)
    try:
        with path.open("rb") as stream:
            size = path.stat().st_size
            for place in (0, max(0, size - _SAMPLED_BYTES)):
                stream.seek(place)
                digest.update(stream.read(_SAMPLED_BYTES))
    except OSError as error:
        raise EnvironmentError_(
            "the file cannot be read", where=str(path), value=str(error), allowed="a readable file"
        ) from error
    return CorpusFile(path.relative_to(root).as_posix(), size, digest.hexdigest())


def _remote(source: str, where: str) -> tuple[str, str, list[CorpusFile]]:
    """Return the file system, the root and the files of a URL."""
    if "::" in source:
        raise ConfigError(
            "not a source: a chain of file systems, such as an archive", where=where, value=source,
            allowed="a path, or the URL of a file or folder", fix="unpack it into a folder",
        )  # fmt: skip
    url = _at_commit(source, where) if source.startswith(_HUB) else source
    try:
        from fsspec.core import url_to_fs

        system, root = url_to_fs(url)
        found: dict[str, dict[str, Any]] = system.find(root, detail=True)
    except ImportError as error:
        raise EnvironmentError_(
            "the package of the file system is not installed", where=where, value=source,
            allowed="file systems whose package is installed",
            fix=f"install what fsspec names: {error}",
        ) from error  # fmt: skip
    except ValueError as error:
        allowed = f"a path or URL: {error}"
        raise ConfigError("not a source", where=where, value=source, allowed=allowed) from error
    except FileNotFoundError:
        found = {}
    except Exception as error:  # every file system has its own errors
        raise _unreachable(source, where, error) from error
    protocol = system.protocol if isinstance(system.protocol, str) else system.protocol[0]
    base = root if root not in found else root.rpartition("/")[0]
    files = []
    shown = {
        path: name for path, info in sorted(found.items())
        if "/." not in f"/{(name := path.removeprefix(base).lstrip('/'))}"
        and info.get("type", "file") == "file"
    }  # fmt: skip
    single = list(found) == [root]
    readable = set(shown.values() if single else _readable([*shown.values()], KINDS, where, source))
    for path, name in shown.items():
        info = found[path]
        if name in readable and _suffix(name) in KINDS:
            # the store's identifier of the content: a blob of the hub, or an entity tag
            known = (info.get(key) for key in ("blob_id", "ETag", "etag"))
            digest = next((str(each) for each in known if each), "")
            files.append(CorpusFile(name, int(info["size"]), digest))
    return protocol, base, files


def _at_commit(source: str, where: str) -> str:
    """Resolve the revision of a URL to its current commit, so that no later push changes it."""
    owner, name, *folders = [*source.removeprefix(_HUB).split("/"), ""]
    name, _, revision = name.partition("@")
    if not owner or not name:
        raise ConfigError(
            "not a dataset on the hub", where=where, value=source,
            allowed=f"{_HUB}OWNER/NAME, optionally followed by a folder or file",
        )  # fmt: skip
    try:
        from huggingface_hub import HfApi
        from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError
    except ImportError as error:
        raise EnvironmentError_(
            "reading from the hub needs huggingface_hub", where=where, value=source,
            allowed="an installation with huggingface_hub",
            fix="pip install open-mythos[data]",
        ) from error  # fmt: skip
    try:
        repository, branch = f"{owner}/{name}", revision or None
        commit = HfApi().dataset_info(repository, revision=branch, timeout=_HUB_TIMEOUT_S).sha
    except (RepositoryNotFoundError, RevisionNotFoundError) as error:
        raise DataError(
            "the hub has no such dataset or revision", where=where, value=source,
            allowed="a public dataset, or one that your token may read",
            fix="check owner, name and revision; for a private one log in with `hf auth login`",
        ) from error  # fmt: skip
    except Exception as error:  # the client raises its own, its transport's and OSError
        raise _unreachable(source, where, error) from error
    return f"{_HUB}{owner}/{name}@{commit}/{'/'.join(folders)}".rstrip("/")


def _unreachable(source: str, where: str, error: Exception) -> EnvironmentError_:
    reason = str(error).strip().splitlines() or [type(error).__name__]
    what = f"the corpus cannot be reached: {reason[0]}"
    return EnvironmentError_(
        what, where=where, value=source, allowed="a source that answers", fix=_HUB_FIX
    )
