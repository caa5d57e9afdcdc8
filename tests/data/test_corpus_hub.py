"""Streaming through the hub's own client, from a server that answers as the hub does."""

from __future__ import annotations

import io
import json
import re
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from huggingface_hub import HfFileSystem, constants

from open_mythos.data import StreamLoader, fineweb_edu, open_corpus
from open_mythos.errors import DataError
from open_mythos.tokenizer import ByteTokenizer, get_vocab_size

COMMIT = "c0ffee" + "0" * 34


def parquet_bytes(file: int) -> bytes:
    into = io.BytesIO()
    texts = [f"<{file}.{row}> a document of this file" for row in range(100)]
    pq.write_table(pa.table({"text": texts, "id": texts}), into, row_group_size=30)
    return into.getvalue()


FILES = {f"sample/10BT/{file:03d}_00000.parquet": parquet_bytes(file) for file in range(3)}
FILES["README.md"] = b"about"


class Hub(ThreadingHTTPServer):
    """A dataset ``o/n`` of one commit."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Answer)
        self.asked: list[str] = []


class Answer(BaseHTTPRequestHandler):
    server: Hub

    def log_message(self, format: str, *args: object) -> None:
        pass

    def do_GET(self) -> None:
        path = unquote(self.path.partition("?")[0])
        self.server.asked.append(path)
        if re.fullmatch(rf"/api/datasets/o/n(/revision/({COMMIT}|v1))?", path):
            self._json({"id": "o/n", "sha": COMMIT, "siblings": [], "tags": []})
        elif match := re.fullmatch(rf"/api/datasets/o/n/tree/{COMMIT}(?:/(.*))?", path):
            self._json(
                [
                    {"type": "file", "oid": f"oid-{name}", "size": len(content), "path": name}
                    for name, content in FILES.items()
                    if name.startswith(match[1] or "")
                ]
            )
        elif match := re.fullmatch(rf"/datasets/o/n/resolve/{COMMIT}/(.*)", path):
            wanted = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers["Range"])
            assert wanted
            self._send(206, FILES[match[1]][int(wanted[1]) : int(wanted[2]) + 1])
        else:
            self._send(404, b"{}", {"X-Error-Code": "RepoNotFound"})

    def _json(self, content: object) -> None:
        self._send(200, json.dumps(content).encode(), {"Content-Type": "application/json"})

    def _send(self, code: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(code)
        for name, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)


@pytest.fixture
def hub(monkeypatch) -> Iterator[Hub]:
    server = Hub()
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    here = f"http://127.0.0.1:{server.server_port}"
    # what the environment variable HF_ENDPOINT does before the client is imported
    monkeypatch.setattr(constants, "ENDPOINT", here)
    monkeypatch.setattr(
        constants, "HUGGINGFACE_CO_URL_TEMPLATE", here + "/{repo_id}/resolve/{revision}/{filename}"
    )
    HfFileSystem.clear_instance_cache()
    yield server
    HfFileSystem.clear_instance_cache()
    server.shutdown()
    thread.join()
    server.server_close()


def test_a_dataset_of_the_hub_streams_as_its_files_do(hub, tmp_path) -> None:
    corpus = open_corpus("hf://datasets/o/n/sample/10BT")
    assert [file.name for file in corpus.files] == ["000_00000.parquet", "001_00000.parquet",
                                                    "002_00000.parquet"]  # fmt: skip
    assert corpus.path(0) == f"datasets/o/n@{COMMIT}/sample/10BT/000_00000.parquet"
    assert not any("/resolve/" in path for path in hub.asked)  # a listing opens nothing
    for name, content in FILES.items():
        if name.startswith("sample"):
            (tmp_path / name.rpartition("/")[2]).write_bytes(content)
    options = {"seq_len": 32, "global_batch": 4}
    remote = StreamLoader(corpus, ByteTokenizer(), **options)
    local = StreamLoader(open_corpus(tmp_path), ByteTokenizer(), **options)
    while remote.epoch < 1:
        assert torch.equal(next(remote).input_ids, next(local).input_ids)
    assert remote.step > 70


def test_a_revision_stands_for_its_commit(hub) -> None:
    whole = open_corpus("hf://datasets/o/n")
    assert [file.name for file in whole.files] == sorted(FILES)[1:]  # README.md is no data
    assert "/api/datasets/o/n/revision/v1" not in hub.asked
    open_corpus("hf://datasets/o/n@v1")
    assert "/api/datasets/o/n/revision/v1" in hub.asked


def test_a_dataset_that_is_not_there(hub) -> None:
    with pytest.raises(DataError, match="no such dataset or revision"):
        open_corpus("hf://datasets/o/m")


@pytest.mark.network
def test_the_real_dataset_and_tokenizer() -> None:
    corpus = open_corpus(fineweb_edu("sample-10BT"))
    assert len(corpus.files) == 14
    assert get_vocab_size("openai/gpt-oss-20b") == 200_064
    assert get_vocab_size("openai-community/gpt2") == 50_304
    loader = StreamLoader(corpus, ByteTokenizer(), seq_len=64, global_batch=2, num_workers=1)
    assert next(loader).input_ids.shape == (2, 64)
