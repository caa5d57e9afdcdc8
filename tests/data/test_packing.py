"""Windows, document numbers, and the batch that carries them."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from open_mythos.data import Batch, PackedWindows, document_ids, prepare
from open_mythos.data.shards import TokenShards
from open_mythos.errors import ConfigError, DataError
from open_mythos.tokenizer import ByteTokenizer


def all_windows(shards: TokenShards, seq_len: int, mask_documents: bool = False) -> Batch:
    windows = PackedWindows(shards, seq_len, mask_documents)
    index = np.arange(len(windows))
    return windows.batch(index, index)


@given(seq_len=st.integers(1, 700))
def test_every_token_but_the_first_is_predicted_once(shards, seq_len: int) -> None:
    batch = all_windows(shards, seq_len)
    stream = torch.from_numpy(shards.tokens(0, len(shards)))
    covered = len(batch) * seq_len
    assert len(shards) - 1 - covered < seq_len
    assert torch.equal(batch.input_ids.flatten(), stream[:covered])
    assert torch.equal(batch.targets.flatten(), stream[1 : covered + 1])
    assert batch.document_ids is None


@given(lengths=st.lists(st.integers(0, 5), min_size=1, max_size=12))
def test_the_end_belongs_to_the_document_that_it_ends(lengths: list[int]) -> None:
    eos = 9
    row = [token for length in lengths for token in [*[1] * length, eos]]
    expected = [i for i, length in enumerate(lengths) for _ in range(length + 1)]
    assert document_ids(torch.tensor([row]), eos).tolist() == [expected]


def test_each_row_counts_its_documents_from_zero(shards) -> None:
    batch = all_windows(shards, 50, mask_documents=True)
    assert batch.document_ids.dtype == torch.int64
    assert (batch.document_ids[:, 0] == 0).all()
    ends = batch.input_ids[:, :-1] == shards.eos_id
    assert torch.equal(batch.document_ids.diff(dim=1), ends.long())


@pytest.mark.parametrize("seq_len", [0, -1, 2.0, True, "8"])
def test_a_sequence_length_that_is_none_is_rejected(shards, seq_len: object) -> None:
    with pytest.raises(ConfigError, match="seq_len"):
        PackedWindows(shards, seq_len, False)


def test_a_split_shorter_than_a_window_is_rejected(tmp_path) -> None:
    prepare(["abc"], tmp_path / "a", ByteTokenizer(), val_fraction=0)
    shards = TokenShards(tmp_path / "a")
    assert len(PackedWindows(shards, 3, False)) == 1
    with pytest.raises(DataError, match="shorter than one window"):
        PackedWindows(shards, 4, False)


@pytest.mark.parametrize("masked", [True, False])
def test_splitting_a_batch_keeps_every_row(shards, masked: bool) -> None:
    windows = PackedWindows(shards, 20, masked)
    batch = windows.batch(np.arange(6), np.arange(6))
    parts = batch.split(3)
    assert [len(part) for part in parts] == [2, 2, 2]
    for name in ("input_ids", "targets", "sample_index"):
        assert torch.equal(torch.cat([getattr(p, name) for p in parts]), getattr(batch, name))
    if masked:
        assert torch.equal(torch.cat([p.document_ids for p in parts]), batch.document_ids)
    else:
        assert all(part.document_ids is None for part in parts)


@pytest.mark.parametrize("n", [0, -1, 4, 7])
def test_a_batch_splits_only_into_equal_parts(shards, n: int) -> None:
    batch = PackedWindows(shards, 20, False).batch(np.arange(6), np.arange(6))
    with pytest.raises(ConfigError, match="equal parts"):
        batch.split(n)


@pytest.mark.parametrize("masked", [True, False])
def test_moving_a_batch_moves_every_tensor(shards, masked: bool) -> None:
    moved = PackedWindows(shards, 20, masked).batch(np.arange(2), np.arange(2)).to("meta")
    tensors = [moved.input_ids, moved.targets, moved.sample_index]
    tensors += [moved.document_ids] if masked else []
    assert all(tensor.device.type == "meta" for tensor in tensors)
    assert (moved.document_ids is None) != masked
