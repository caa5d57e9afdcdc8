"""GPUs that a plan can use: memory, link rates and prices.

Peak FLOP rates come from :data:`open_mythos.train.monitoring.utilization.PEAKS`. Memory and link
rates are from the vendor data sheets named with each entry. Prices are assumptions.
"""

from __future__ import annotations

from dataclasses import dataclass

from open_mythos.checks import check_fields, check_number, checked, pick
from open_mythos.train.monitoring.utilization import device_peak

NODE = 8
"""GPUs per node, connected by NVLink, with one network adapter each (DGX and HGX boards)."""
USABLE = 0.92
"""Usable share of the memory; the rest covers the CUDA context, NCCL and fragmentation."""
LINK_EFFICIENCY = 0.8
"""Share of the link rate that large collectives reach."""
MFU = 0.3
"""Assumed share of the peak FLOP rate while computing; not measured. Llama 3, a tuned dense model,
reports 0.38 to 0.43 including communication (arXiv 2407.21783, table 4)."""


@dataclass(frozen=True)
class GPU:
    """A GPU model.

    Attributes:
        name: Name as known to :func:`device_peak`.
        memory: Bytes.
        nvlink: Bytes per second to the other GPUs of the node, one direction.
        network: Bytes per second to other nodes, one direction.
        price: US dollars per GPU hour; an assumption.
        source: Vendor documents.
    """

    name: str
    memory: float
    nvlink: float
    network: float
    price: float
    source: str

    def __post_init__(self) -> None:
        check_fields("", self)
        for name in ("memory", "nvlink", "network", "price"):
            check_number(name, getattr(self, name), ge=0)

    @property
    def usable(self) -> float:
        """Usable bytes of memory."""
        return USABLE * self.memory

    def rate(self, dtype: str) -> float:
        """Return the peak FLOP/s of dense matmuls in ``dtype``."""
        peak = device_peak(self.name, dtype)
        assert peak is not None
        return peak


GPUS = {
    "h100": GPU(
        "H100 SXM", 80e9, 450e9, 50e9, 3.0,
        "NVIDIA H100 Tensor Core GPU data sheet and architecture paper (SXM5); DGX H100 data sheet",
    ),
    "h200": GPU(
        "H200 SXM", 141e9, 450e9, 50e9, 4.0,
        "NVIDIA H200 Tensor Core GPU data sheet (SXM); DGX H200 data sheet",
    ),
    "b200": GPU(
        "B200", 180e9, 900e9, 50e9, 6.0,
        "NVIDIA Blackwell data sheet (HGX B200); DGX B200 data sheet",
    ),
}  # fmt: skip


@checked
def gpu(name: str) -> GPU:
    """Return the entry ``name`` of :data:`GPUS`, case-insensitively."""
    return pick(GPUS, name.lower(), "gpu", what="GPU")
