"""The 3B variant on FineWeb-Edu, 30 billion tokens.

    python training/3b_fine_web_edu.py --dry-run
    python training/3b_fine_web_edu.py
    torchrun --nproc_per_node=8 training/3b_fine_web_edu.py --subset sample-100BT

The tokenizer is that of gpt-oss-20b. Its vocabulary of 200,064 makes 4.2 B parameters of the
variant, whose name counts a vocabulary of 32,000; with --model.tie_embeddings true they are 3.6 B.
Weights, gradients and two moments in float32 are 16 bytes a parameter: 67 GB, or 57 GB tied, and
activations come on top. One process needs a GPU that holds them (fewer activations:
--train.micro_batch 1); several share them by FSDP2.

The default subset has 10 B tokens: 30 B are three epochs of it. sample-100BT repeats nothing.
"""

import sys

from open_mythos.cli import main

if __name__ == "__main__":
    sys.exit(main(["train", "--recipe", "3b_fine_web_edu", *sys.argv[1:]]))
