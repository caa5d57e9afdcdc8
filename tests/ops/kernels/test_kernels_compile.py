"""What an H100 would be given: each kernel compiled as its launch asks for, without a GPU.

Nothing may spill out of the registers, shared memory must suffice, and the memory-bound loads must
be 16 bytes wide: all of this is decided by the compiler, so it can be read off its output.
"""

from __future__ import annotations

import re
import subprocess
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

triton = pytest.importorskip("triton", reason="kernels are compiled where Triton is installed")

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource, CompiledKernel  # noqa: E402

from open_mythos.ops.kernels import paged_decode, weight_gradient  # noqa: E402

SHARED_BYTES = 227 << 10  # what one program may have on an H100
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
TYPES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.int64: "i64", torch.int32: "i32"}


class Launch:
    """Replaces a kernel: compiles it for the arguments of its first launch."""

    def __init__(self, kernel: Any) -> None:
        self.kernel, self.compiled = kernel, None

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        return self

    def __call__(self, *values: Any, **named: Any) -> None:
        names = self.kernel.arg_names
        constants = {name: named.pop(name) for name in names if name in named}
        signature, hints = dict.fromkeys(constants, "constexpr"), {}
        for at, (name, value) in enumerate(zip(names, values, strict=False)):
            signature[name] = self.kind(value)
            # as at a launch: 1 is a constant, multiples of 16 are known to be such
            if isinstance(value, int) and value == 1:
                signature[name], constants[name] = "constexpr", 1
            elif not isinstance(value, float) and self.number(value) % 16 == 0:
                hints[at,] = [["tt.divisibility", 16]]
        constants = {(names.index(name),): value for name, value in constants.items()}
        source = ASTSource(self.kernel, {n: signature[n] for n in names}, constants, hints)
        named = {"enable_fp_fusion": True, **named}
        self.compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=named)

    @staticmethod
    def number(value: Any) -> int:
        return value if isinstance(value, int) else value.data_ptr()

    @staticmethod
    def kind(value: Any) -> str:
        if isinstance(value, torch.Tensor):
            return "*" + TYPES[value.dtype]
        return "fp32" if isinstance(value, float) else "i32"


def launched(
    monkeypatch: pytest.MonkeyPatch, module: ModuleType, name: str, function: Any, *arguments: Any
) -> CompiledKernel:
    """Compile kernel ``name`` as ``function(*arguments)`` launches it."""
    launch = Launch(getattr(module, name))
    monkeypatch.setattr(module, name, launch)
    function(*arguments)
    return launch.compiled


def resources(compiled: CompiledKernel, folder: Path) -> dict[str, int]:
    """Return registers per thread and bytes of its stack."""
    cubin = folder / "kernel.cubin"
    cubin.write_bytes(compiled.asm["cubin"])
    run = [TOOLS / "cuobjdump", "--dump-resource-usage", cubin]
    text = subprocess.run(run, capture_output=True, text=True, check=True).stdout
    return {name: int(number) for name, number in re.findall(r"(REG|STACK):(\d+)", text)}


@pytest.fixture(autouse=True)
def _afresh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Disable the cache of compiled kernels."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))


def empty(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype)


def test_weight_gradient(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    x, grad = empty(4, 512, dtype=torch.bfloat16), empty(4, 1024, dtype=torch.bfloat16)
    compiled = launched(
        monkeypatch, weight_gradient, "_sum_of_outer_products", weight_gradient.weight_gradient,
        [x] * 16, [grad] * 16, torch.zeros(16, 64, dtype=torch.int32),
    )  # fmt: skip
    assert resources(compiled, tmp_path)["STACK"] == 0
    assert compiled.metadata.shared <= SHARED_BYTES // 2
    assert re.search(r"wgmma\.mma_async", compiled.asm["ptx"])
    assert re.search(r"cp\.async\.cg\.shared\.global .*0x10", compiled.asm["ptx"])  # 16 bytes


@pytest.mark.parametrize(
    ("heads", "width", "rank"),
    [((1, 16), 576, 512), ((1, 24), 416, 384), ((8, 4), 128, None), ((2, 16), 64, None)],
)
@pytest.mark.parametrize("paged", [True, False])
def test_paged_decode(
    heads: tuple[int, int], width: int, rank: int | None, paged: bool,
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    entry = width if rank is not None else 2 * heads[0] * width
    pool = empty(2, 64 if paged else 512, entry, dtype=torch.bfloat16)
    table, lengths = torch.zeros(2, 16, dtype=torch.int64), torch.zeros(2, dtype=torch.int64)
    monkeypatch.setattr(paged_decode, "_shared_memory", lambda device: SHARED_BYTES)
    merge = Launch(paged_decode._merge)
    monkeypatch.setattr(paged_decode, "_merge", merge)
    compiled = launched(
        monkeypatch, paged_decode, "_attend", paged_decode.decode,
        empty(2, *heads, width, dtype=torch.bfloat16), pool,
        *((table, lengths) if paged else (None, None)), None, rank, width**-0.5,
    )  # fmt: skip
    assert resources(compiled, tmp_path)["STACK"] == 0
    assert compiled.metadata.shared <= SHARED_BYTES // 2  # two programs to a multiprocessor
    assert re.search(r"cp\.async\.cg\.shared\.global .*0x10", compiled.asm["ptx"])
    assert re.search(r"mma\.sync", compiled.asm["ptx"])
    assert resources(merge.compiled, tmp_path)["STACK"] == 0
