"""Kernels run in Triton's interpreter, in a process of their own.

Triton decides when it is imported, from TRITON_INTERPRET, whether its functions are compiled or
interpreted. Other tests of the same process use ``torch.compile``, which imports it as well. So the
interpreted tests are left out here, and ``test_in_interpreter.py`` runs them in a second process;
``TRITON_INTERPRET=1 pytest tests/ops/kernels`` does the same by hand.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import pytest

INTERPRETING = os.environ.get("TRITON_INTERPRET") == "1"
TESTS = {path.name for path in Path(__file__).parent.glob("test_*.py")}
INTERPRETED = {name for name in TESTS if name.endswith("_interpreted.py")}

if INTERPRETING:  # liger-kernel imports them, if it can, for what is not tested here
    sys.modules.update({"peft": None, "transformers": None})  # type: ignore[dict-item]

collect_ignore = sorted(TESTS - INTERPRETED if INTERPRETING else INTERPRETED)


@pytest.fixture(autouse=INTERPRETING)
def _bfloat16_products(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter keeps bfloat16 as 16-bit integers, and would multiply those."""
    import numpy as np
    import triton.language as tl
    from triton.runtime import interpreter

    def floats(part: Any) -> np.ndarray:
        if part.dtype.scalar != tl.bfloat16:
            return part.data
        return (part.data.astype(np.uint32) << 16).view(np.float32)

    def dot(self: Any, a: Any, b: Any, total: Any, *_: Any) -> Any:
        product = np.matmul(floats(a), floats(b), dtype=total.data.dtype)
        return interpreter.TensorHandle(product + total.data, total.dtype.scalar)

    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", dot)
