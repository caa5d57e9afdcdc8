"""Entry point of ``python -m open_mythos`` and of launchers such as ``torchrun -m``."""

import sys

from open_mythos.cli import main

sys.exit(main())
