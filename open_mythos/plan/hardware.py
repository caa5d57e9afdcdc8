"""Clusters that a plan can be made for: GPUs in nodes of eight, their memory, links and prices.

Peak rates are those of the table of the training's utilisation metrics,
:data:`open_mythos.train.monitoring.utilisation.PEAKS`. Capacities and link rates are those of the
vendor's data sheets, named beside each entry. Prices are assumptions.
"""

from __future__ import annotations

from dataclasses import dataclass

from open_mythos.checks import pick
from open_mythos.train.monitoring.utilisation import device_peak

NODE = 8
"""GPUs of a node, joined by NVLink; each has a network adapter of its own (DGX and HGX boards)."""
USABLE = 0.92
"""Share of the memory that a plan fills; the rest is for the CUDA context, NCCL and fragments."""
LINK_EFFICIENCY = 0.8
"""Share of a link's rate that large collective operations reach."""
MFU = 0.3
"""Share of the peak rate while computing. Nobody has measured this code on such clusters. Llama 3,
dense and tuned, reports 0.38 to 0.43 including communication (arXiv 2407.21783, table 4)."""


@dataclass(frozen=True)
class GPU:
    """One kind of GPU.

    Attributes:
        name: A name that :func:`device_peak` knows.
        memory: Bytes.
        nvlink: Bytes per second to the other GPUs of the node, in one direction.
        network: Bytes per second to other nodes, in one direction.
        price: US dollars per GPU and hour; an assumption, not an offer.
        source: The vendor's documents.
    """

    name: str
    memory: float
    nvlink: float
    network: float
    price: float
    source: str

    @property
    def usable(self) -> float:
        """Bytes that a plan may fill."""
        return USABLE * self.memory

    def rate(self, dtype: str) -> float:
        """Peak FLOPs per second of dense matmuls in ``dtype``."""
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
"""Name -> GPU."""


def gpu(name: str) -> GPU:
    """Return the GPU called ``name``.

    Raises:
        ConfigError: There is no such entry.
    """
    return pick(GPUS, name.lower(), "gpu", what="GPU")
