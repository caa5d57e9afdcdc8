"""The run of 140 million parameters on token shards that were prepared beforehand.

    open-mythos data prepare my_texts/ my_shards --tokenizer bpe:32768
    python training/prepared_shards.py --source my_shards --dry-run
    python training/prepared_shards.py --source my_shards

Text is tokenised once, the windows of an epoch are shuffled one by one, and a validation split is
there. The tokenizer, and with it the vocabulary, is that of the folder.
"""

import sys

from open_mythos.cli import main

if __name__ == "__main__":
    sys.exit(main(["train", "--recipe", "prepared_shards", *sys.argv[1:]]))
