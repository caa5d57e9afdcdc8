"""From text to training batches: corpora, token shards, streams, packing, exact resume.

>>> from open_mythos.data import Loader, TokenShards, prepare
>>> from open_mythos.tokenizer import load_tokenizer
>>> prepare("stdlib", "shards", load_tokenizer("byte"))      # doctest: +SKIP
>>> loader = Loader(TokenShards("shards"), seq_len=256, global_batch=8)     # doctest: +SKIP

or, streaming without preparation:

>>> from open_mythos.data import StreamLoader, fineweb_edu, open_corpus
>>> corpus = open_corpus(fineweb_edu("sample-10BT"))     # doctest: +SKIP
>>> loader = StreamLoader(corpus, load_tokenizer(), seq_len=2048, global_batch=8)  # doctest: +SKIP
"""

from open_mythos.data.batch import IGNORE_INDEX, Batch, document_ids
from open_mythos.data.corpus import Corpus, fineweb_edu, open_corpus
from open_mythos.data.documents import read_documents
from open_mythos.data.held_out import HeldOutWindows, TooFewHeldOutError
from open_mythos.data.index import Index
from open_mythos.data.loader import EpochWindows, Loader, PackedWindows
from open_mythos.data.permutation import Permutation
from open_mythos.data.prepare import prepare
from open_mythos.data.shards import TokenShards
from open_mythos.data.stream import StreamLoader

__all__ = [
    "IGNORE_INDEX",
    "Batch",
    "Corpus",
    "EpochWindows",
    "HeldOutWindows",
    "Index",
    "Loader",
    "PackedWindows",
    "Permutation",
    "StreamLoader",
    "TokenShards",
    "TooFewHeldOutError",
    "document_ids",
    "fineweb_edu",
    "open_corpus",
    "prepare",
    "read_documents",
]
