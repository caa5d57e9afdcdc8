"""Text to training batches: sources, token shards, packing, exact-resume loading, synthetic tasks.

>>> from open_mythos.data import Loader, TokenShards, prepare
>>> from open_mythos.tokenizer import load_tokenizer
>>> prepare("stdlib", "shards", load_tokenizer("byte"))      # doctest: +SKIP
>>> loader = Loader(TokenShards("shards"), seq_len=256, global_batch=8)     # doctest: +SKIP
"""

from open_mythos.data.batch import IGNORE_INDEX, Batch
from open_mythos.data.facts import ComposedFacts
from open_mythos.data.in_context import InContextHop
from open_mythos.data.index import Index
from open_mythos.data.loader import EpochWindows, Loader
from open_mythos.data.packing import PackedWindows, document_ids
from open_mythos.data.permutation import Permutation
from open_mythos.data.prepare import prepare
from open_mythos.data.shards import TokenShards
from open_mythos.data.sources import read_documents
from open_mythos.data.synthetic import PermHop, PermHopLoader, TaskLoader

__all__ = [
    "IGNORE_INDEX",
    "Batch",
    "ComposedFacts",
    "EpochWindows",
    "InContextHop",
    "Index",
    "Loader",
    "PackedWindows",
    "PermHop",
    "PermHopLoader",
    "Permutation",
    "TaskLoader",
    "TokenShards",
    "document_ids",
    "prepare",
    "read_documents",
]
