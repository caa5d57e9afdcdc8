"""Train 140 M parameters on prepared token shards.

    open-mythos data prepare my_texts/ my_shards --tokenizer bpe:32768
    python training/prepared_shards.py --source my_shards --dry-run
    python training/prepared_shards.py --source my_shards

Text is tokenized once, sequences are shuffled individually, and the shards have a validation split.
Tokenizer and vocabulary are those of the shards.
"""

import sys

from open_mythos.cli import main

if __name__ == "__main__":
    sys.exit(main(["train", "--recipe", "prepared_shards", *sys.argv[1:]]))
