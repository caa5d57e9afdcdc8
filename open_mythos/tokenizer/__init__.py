"""Text to token ids and back: bytes, a byte-level BPE, and tokenizers of the Hugging Face hub.

All of them implement :class:`Tokenizer` and follow these rules:

* special tokens are never read from text: ``"<|eos|>"`` in a string is encoded as ordinary
  characters, and ``decode(encode(s)) == s``;
* bos, eos and pad are three different ids below ``len(tokenizer)``;
* ``vocab_size``, the vocabulary of a model, is ``len(tokenizer)`` rounded up to a multiple of 64.

A character may span several tokens: decode a stream of tokens with :class:`StreamDecoder`. Neither
torch nor transformers is imported until it is needed.
"""

from open_mythos.tokenizer.byte_level import ByteTokenizer
from open_mythos.tokenizer.hub import DEFAULT_MODEL_ID, MythosTokenizer
from open_mythos.tokenizer.interface import SPECIALS, Tokenizer
from open_mythos.tokenizer.loading import get_vocab_size, load_tokenizer
from open_mythos.tokenizer.rust_backed import BPETokenizer
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
