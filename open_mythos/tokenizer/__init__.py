"""Text to token ids and back: bytes, our own BPE, and tokenizers of the Hugging Face hub.

All of them share the interface :class:`Tokenizer`, and these rules:

* text is only text: ``"<|eos|>"`` inside a string is encoded as ordinary characters, so the ids of
  the special tokens enter a sequence by id alone and ``decode(encode(s)) == s``;
* bos, eos and pad are three different ids below ``len(tokenizer)``;
* ``vocab_size``, by which models are sized, is ``len(tokenizer)`` rounded up to a multiple of 64.

A character may span several tokens, so decoding token by token breaks it: stream through
:class:`StreamDecoder`. Neither torch nor transformers is imported until it is needed.
"""

from open_mythos.tokenizer.bpe import BPETokenizer
from open_mythos.tokenizer.byte_level import ByteTokenizer
from open_mythos.tokenizer.hub import DEFAULT_MODEL_ID, MythosTokenizer
from open_mythos.tokenizer.interface import SPECIALS, Tokenizer
from open_mythos.tokenizer.loading import get_vocab_size, load_tokenizer
from open_mythos.tokenizer.stream import StreamDecoder

__all__ = [
    "DEFAULT_MODEL_ID",
    "SPECIALS",
    "BPETokenizer",
    "ByteTokenizer",
    "MythosTokenizer",
    "StreamDecoder",
    "Tokenizer",
    "get_vocab_size",
    "load_tokenizer",
]
