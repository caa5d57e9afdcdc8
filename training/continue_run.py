"""Go on with a trained model on other text, with a schedule of its own.

    python training/continue_run.py --checkpoint runs/140m_fine_web_edu --source my_texts/ \\
        --tokens 200000000 --dry-run

Weights, architecture and tokenizer are those of the checkpoint; moments, data position and step
begin anew. The learning rate rises again, to less than in a first run, and falls linearly towards
zero over the last steps. To go on with the same run, call its own recipe with --resume latest.
"""

import sys

from open_mythos.cli import main

if __name__ == "__main__":
    sys.exit(main(["train", "--recipe", "continue_run", *sys.argv[1:]]))
