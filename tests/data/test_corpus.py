"""A corpus is a list of files; its units hold every document once, from any place on."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path
from typing import ClassVar

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fsspec.implementations.memory import MemoryFileSystem
from hypothesis import given, settings
from hypothesis import strategies as st

from open_mythos.data import Corpus, StreamLoader, fineweb_edu, open_corpus
from open_mythos.data import documents as reading
from open_mythos.data.corpus import Unit
from open_mythos.data.documents import read_unit
from open_mythos.errors import ConfigError, DataError, EnvironmentError_
from open_mythos.tokenizer import ByteTokenizer

TEXTS = [f"text {i} " + "wörds " * (i % 9) for i in range(50)]


def parquet_bytes(texts: list, rows: int = 8, column: str = "text", **options) -> bytes:
    into = io.BytesIO()
    table = pa.table({"id": range(len(texts)), column: texts})
    pq.write_table(table, into, row_group_size=rows, **options)
    return into.getvalue()


def jsonl_bytes(texts: list[str]) -> bytes:
    return "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()


def one_file(path: Path, content: bytes) -> Corpus:
    path.write_bytes(content)
    return open_corpus(path)


def texts_of(corpus: Corpus, parts: int) -> list[str]:
    units = [Unit(file, part, parts) for file in range(len(corpus.files)) for part in range(parts)]
    return [document.text for unit in units for document in read_unit(corpus, unit)]


CONTENTS = {
    "a.parquet": parquet_bytes(TEXTS),
    "b.parquet": parquet_bytes(TEXTS, rows=1000),  # one row group: parts are rows
    "c.jsonl": jsonl_bytes(TEXTS),
    "d.jsonl": b"\n\n" + jsonl_bytes(TEXTS).replace(b"\n", b"\r\n\n")[:-3],  # no last line end
}


@pytest.mark.parametrize("name", CONTENTS)
@pytest.mark.parametrize("parts", [1, 2, 3, 7, 50, 400])
def test_parts_hold_every_document_once_and_in_order(tmp_path, name: str, parts: int) -> None:
    corpus = one_file(tmp_path / name, CONTENTS[name])
    assert texts_of(corpus, parts) == TEXTS


@pytest.mark.parametrize("name", [*CONTENTS, "e.txt"])
def test_a_unit_is_read_from_any_place_on(tmp_path, name: str) -> None:
    long_text = "".join(f"line {i} é\n" for i in range(40_000)).encode()
    corpus = one_file(tmp_path / name, CONTENTS.get(name, long_text))
    for unit in (Unit(0, 0, 1), Unit(0, 1, 3)):
        documents = list(read_unit(corpus, unit))
        cursors = [document.cursor for document in documents]
        assert cursors == sorted(set(cursors))
        for number in range(1, len(documents), 5):
            place = documents[number].cursor
            assert list(read_unit(corpus, unit, place)) == documents[number:]
            assert list(read_unit(corpus, unit, place + 1)) == documents[number + 1 :]


@settings(max_examples=60)
@given(
    lines=st.lists(st.sampled_from([0, 1, 3, 1 << 15, 1 << 16, 150_000]), max_size=12),
    end=st.booleans(), parts=st.integers(1, 6),
)  # fmt: skip
def test_the_pieces_of_a_text_are_the_text(tmp_path_factory, lines, end, parts) -> None:
    text = "x" + "\n".join("é" * (length // 2) for length in lines) + "\n" * end
    path = tmp_path_factory.mktemp("text") / "a.txt"
    corpus = one_file(path, text.encode())
    assert "".join(texts_of(corpus, parts)) == text


def test_row_groups_stay_whole_where_there_are_enough(tmp_path) -> None:
    corpus = one_file(tmp_path / "a.parquet", CONTENTS["a.parquet"])  # 7 row groups
    lengths = [len(list(read_unit(corpus, Unit(0, part, 3)))) for part in range(3)]
    assert lengths == [16, 16, 18]
    lengths = [len(list(read_unit(corpus, Unit(0, part, 8)))) for part in range(8)]
    assert max(lengths) - min(lengths) <= 1


def test_units_are_many_enough_for_the_lanes(tmp_path) -> None:
    for number in range(3):
        (tmp_path / f"{number}.parquet").write_bytes(parquet_bytes(["x" * 3000] * 200))
    (tmp_path / "short.txt").write_text("short")
    corpus = open_corpus(tmp_path)
    for lanes in (1, 4, 16):
        units = corpus.units(lanes)
        assert 8 * lanes <= len(units) <= 8 * lanes + len(corpus.files)
        assert sum(corpus.unit_size(unit) for unit in units) == corpus.size
    assert [unit for unit in corpus.units(16) if unit.file == 3] == [Unit(3, 0, 1)]


def test_the_standard_library_streams() -> None:
    corpus = open_corpus("stdlib")
    assert corpus.size > 5_000_000
    loader = StreamLoader(corpus, ByteTokenizer(), seq_len=256, global_batch=4)
    text = "".join(
        ByteTokenizer().decode(row) for _ in range(30) for row in next(loader).input_ids.tolist()
    )
    assert "import" in text


@pytest.mark.parametrize("kind", ["folder", "file", "memory"])
def test_the_same_files_are_the_same_corpus_in_any_location(tmp_path, kind: str) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "a.jsonl").write_bytes(CONTENTS["c.jsonl"])
    (tmp_path / ".hidden.jsonl").write_bytes(b"never read")
    (tmp_path / "model.pkl").write_bytes(b"\x80\x04never read")
    (tmp_path / "empty.txt").write_bytes(b"")
    source = tmp_path / "sub" / "a.jsonl" if kind == "file" else tmp_path
    if kind == "memory":
        memory = fsspec.filesystem("memory")
        memory.pipe(f"/{tmp_path.name}/sub/a.jsonl", CONTENTS["c.jsonl"])
        memory.pipe(f"/{tmp_path.name}/model.pkl", b"\x80\x04never read")
        source = f"memory://{tmp_path.name}"
    corpus = open_corpus(str(source))
    assert [file.name for file in corpus.files] == ["a.jsonl" if kind == "file" else "sub/a.jsonl"]
    assert texts_of(corpus, 3) == TEXTS
    assert corpus.fingerprint != open_corpus(str(source), "body").fingerprint


def test_changed_content_is_another_corpus(tmp_path) -> None:
    before = one_file(tmp_path / "a.jsonl", jsonl_bytes(TEXTS)).fingerprint
    assert one_file(tmp_path / "a.jsonl", jsonl_bytes(TEXTS)).fingerprint == before
    assert one_file(tmp_path / "a.jsonl", jsonl_bytes(TEXTS[::-1])).fingerprint != before


def test_invalid_sources(tmp_path) -> None:
    with pytest.raises(DataError, match="no such source"):
        open_corpus(tmp_path / "missing")
    with pytest.raises(DataError, match="no file that can be read"):
        open_corpus(tmp_path)
    with pytest.raises(DataError, match="no file that can be read"):
        open_corpus("memory://nothing/there")
    with pytest.raises(ConfigError, match="not a source"):
        open_corpus("nosuchprotocol://x")
    (tmp_path / "a.txt").write_text("")
    with pytest.raises(DataError, match="holds no text"):
        open_corpus(tmp_path)
    with pytest.raises(ConfigError, match="sample-10BT"):
        fineweb_edu("sample-1BT")


@pytest.mark.parametrize("name", ["a.parquet", "a.jsonl"])
def test_an_empty_file_is_named(tmp_path, name: str) -> None:
    (tmp_path / name).write_bytes(b"")
    with pytest.raises(DataError, match=rf"{name}, byte 0"):
        open_corpus(tmp_path)


def test_a_parquet_file_without_rows_is_no_error(tmp_path) -> None:
    (tmp_path / "a.parquet").write_bytes(parquet_bytes(pa.array([], pa.string())))
    assert texts_of(open_corpus(tmp_path), 3) == []


def test_damage_is_located(tmp_path) -> None:
    def read(content: bytes, name: str) -> list[str]:
        return texts_of(one_file(tmp_path / name, content), 3)

    flipped = parquet_bytes(TEXTS, compression="none", use_dictionary=False,
                            write_page_checksum=True).replace(b"text 30", b"tezt 30")  # fmt: skip
    with pytest.raises(DataError, match=r"a\.parquet, row (2[4-9]|30)"):
        read(flipped, "a.parquet")
    with pytest.raises(DataError, match=r"b\.parquet, row 0"):
        read(CONTENTS["a.parquet"][:-5], "b.parquet")
    with pytest.raises(DataError, match="no column 'text'"):
        read(parquet_bytes(TEXTS, column="body"), "d.parquet")
    with pytest.raises(DataError, match=r"e\.jsonl, byte 30") as caught:
        read(b'{"text": "x"}\n{"text": "yy"}\n\n{"text": 3}\n', "e.jsonl")
    assert "not a string" in str(caught.value)
    with pytest.raises(DataError, match=r"f\.txt, byte 100000"):
        read(b"line\n" * 20_000 + b"\x80", "f.txt")


def test_a_missing_or_changed_file_is_named(tmp_path) -> None:
    corpus = one_file(tmp_path / "a.jsonl", CONTENTS["c.jsonl"])
    (tmp_path / "a.jsonl").write_bytes(CONTENTS["c.jsonl"][:-10])
    with pytest.raises(DataError, match=rf"a\.jsonl, byte {len(CONTENTS['c.jsonl']) - 10}"):
        texts_of(corpus, 1)
    (tmp_path / "a.jsonl").unlink()
    with pytest.raises(DataError, match=r"a\.jsonl, byte 0"):
        texts_of(corpus, 1)


class FakeHub(MemoryFileSystem):
    """The hub's file system with its files in memory; reads fail as often as ``faults`` says."""

    protocol = "hf"
    store: ClassVar[dict] = {}
    pseudo_dirs: ClassVar[list] = [""]
    faults = 0
    opened = 0

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return "/" + path.removeprefix("hf://").strip("/")

    def find(self, path, maxdepth=None, withdirs=False, detail=False, **kwargs):
        found = super().find(path, maxdepth, withdirs, detail=True, **kwargs)
        return {name: info | {"blob_id": "b" + name[-9:]} for name, info in found.items()}

    def _open(self, path, mode="rb", **kwargs):
        FakeHub.opened += 1
        return Unreliable(super()._open(path, mode, **kwargs).getvalue())


class Unreliable(io.BytesIO):
    def read(self, size: int = -1) -> bytes:
        if FakeHub.faults:
            FakeHub.faults -= 1
            raise RuntimeError("the connection was closed")  # of no class that we could know
        return super().read(size)


@pytest.fixture
def hub(monkeypatch):
    """``hf://datasets/o/n`` with a commit, two files in ``sample/10BT`` and one elsewhere."""
    from huggingface_hub import HfApi, HfFileSystem

    fsspec.register_implementation("hf", FakeHub, clobber=True)
    FakeHub.clear_instance_cache()
    FakeHub.store.clear()
    root = "/datasets/o/n@c0ffee/"
    system = fsspec.filesystem("hf")
    system.pipe(root + "sample/10BT/000.parquet", CONTENTS["a.parquet"])
    system.pipe(root + "sample/10BT/001.parquet", CONTENTS["b.parquet"])
    system.pipe(root + "README.md", b"about")
    FakeHub.faults = FakeHub.opened = 0
    asked = []

    def dataset_info(self, repo_id, *, revision=None, timeout=None):
        asked.append((repo_id, revision))
        return type("Info", (), {"sha": "c0ffee"})

    monkeypatch.setattr(HfApi, "dataset_info", dataset_info)
    monkeypatch.setattr(reading, "RETRY_DELAYS_S", (0.0, 0.0, 0.0))
    yield asked
    fsspec.register_implementation("hf", HfFileSystem, clobber=True)
    FakeHub.clear_instance_cache()


def test_a_folder_of_the_hub_is_read_at_a_commit(hub) -> None:
    corpus = open_corpus("hf://datasets/o/n/sample/10BT")
    assert hub == [("o/n", None)]
    assert [file.name for file in corpus.files] == ["000.parquet", "001.parquet"]
    assert "@c0ffee/" in corpus.path(0)
    assert FakeHub.opened == 0  # a listing opens nothing
    assert texts_of(corpus, 2) == TEXTS * 2
    other = open_corpus("hf://datasets/o/n@v2/sample/10BT")
    assert hub[1] == ("o/n", "v2")
    assert other.fingerprint == corpus.fingerprint
    single = open_corpus("hf://datasets/o/n/sample/10BT/001.parquet")
    assert [file.name for file in single.files] == ["001.parquet"]
    assert texts_of(single, 2) == TEXTS


def test_a_failed_read_is_retried(hub, caplog) -> None:
    corpus = open_corpus("hf://datasets/o/n/sample/10BT")
    FakeHub.faults = 3
    assert texts_of(corpus, 1) == TEXTS * 2
    assert caplog.text.count("the connection was closed") == 3
    FakeHub.faults = 4
    with pytest.raises(EnvironmentError_, match="tried 4 times") as caught:
        texts_of(corpus, 1)
    assert "000.parquet" in caught.value.where


def test_reading_resumes_where_it_failed(hub, monkeypatch) -> None:
    """Faults between documents: none is given twice, none is left out."""
    monkeypatch.setattr(reading, "_BUFFER_BYTES", 64)
    corpus = open_corpus("hf://datasets/o/n/sample/10BT")
    texts = []
    for number, document in enumerate(read_unit(corpus, Unit(0, 0, 1))):
        texts.append(document.text)
        FakeHub.faults = number % 3
    assert texts == TEXTS


def test_a_hub_that_cannot_be_reached_says_what_to_do(hub, monkeypatch) -> None:
    from huggingface_hub import HfApi

    def unreachable(*_: object, **__: object) -> None:
        raise ConnectionError("no route to host")

    monkeypatch.setattr(HfApi, "dataset_info", unreachable)
    with pytest.raises(EnvironmentError_, match="no route to host") as caught:
        open_corpus(fineweb_edu())
    assert "hf download" in caught.value.fix
    monkeypatch.setattr(FakeHub, "find", unreachable)
    monkeypatch.setattr(HfApi, "dataset_info", lambda *_, **__: type("Info", (), {"sha": "c"}))
    with pytest.raises(EnvironmentError_, match="no route to host"):
        open_corpus("hf://datasets/o/n")


def test_what_the_hub_does_not_have(hub, monkeypatch) -> None:
    from huggingface_hub import HfApi
    from huggingface_hub.errors import RepositoryNotFoundError

    with pytest.raises(DataError, match="no file that can be read"):
        open_corpus("hf://datasets/o/n/sample/11BT")
    with pytest.raises(ConfigError, match="OWNER/NAME"):
        open_corpus("hf://datasets/o")

    def missing(*_: object, **__: object) -> None:
        raise RepositoryNotFoundError.__new__(RepositoryNotFoundError)

    monkeypatch.setattr(HfApi, "dataset_info", missing)
    with pytest.raises(DataError, match="no such dataset"):
        open_corpus("hf://datasets/o/n")


def test_the_hub_without_its_client_names_the_extra(monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(EnvironmentError_, match=r"open-mythos\[data\]"):
        open_corpus(fineweb_edu())
