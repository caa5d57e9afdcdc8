"""The byte tokenizer's ids."""

from tokenizer.samples import BYTE


def test_the_byte_tokenizer_is_fixed() -> None:
    assert BYTE.encode("é") == [0xC3, 0xA9]
    assert (BYTE.bos_id, BYTE.eos_id, BYTE.pad_id) == (256, 257, 258)
    assert (len(BYTE), BYTE.vocab_size) == (259, 320)
    assert BYTE.decode([0xC3]) == "\ufffd"
