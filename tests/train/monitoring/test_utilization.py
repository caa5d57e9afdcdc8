"""FLOPs of the loops that ran, and the peaks they are compared with."""

import math

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from open_mythos import DenseTransformer, Depth, MythosConfig, OpenMythos
from open_mythos.accounting import account
from open_mythos.train.loss import next_token_loss
from open_mythos.train.monitoring.utilization import PEAKS, Utilization, device_peak

CONFIG = MythosConfig(
    vocab_size=40, dim=32, n_heads=4, n_kv_heads=2, max_seq_len=16, max_loop_iters=6,
    prelude_layers=1, coda_layers=1, attn_type="gqa", n_experts=0, ffn_dim=64, lora_rank=2,
)  # fmt: skip
T = 12


def counted(model, **depth) -> int:
    """FLOPs that PyTorch counts in forward and backward pass of a step."""
    ids = torch.randint(0, 40, (3, T))
    with FlopCounterMode(display=False) as counter:
        next_token_loss(
            model,
            ids,
            ids,
            step_tokens=3 * T,
            step_sequences=3,
            depth=Depth(**depth),
        ).total.backward()
    return counter.get_total_flops()


@pytest.mark.parametrize(("depths", "grad_loops"), [([2, 5, 3], None), ([4, 4, 4], 2)])
def test_the_loops_that_ran_and_the_gradients_that_flowed(depths, grad_loops):
    """Against PyTorch's counter, which counts whole squares where causal attention needs half and
    cannot take the input's gradient into account: attention and the first layer are small here."""
    model = OpenMythos(CONFIG)
    use = Utilization(account(model, context=T), grad_loops)
    ours = use.step_flops(depths, 3, T)
    theirs = counted(model, n_loops=torch.tensor(depths), grad_loops=grad_loops)
    assert ours == pytest.approx(theirs, rel=0.08)
    without = Utilization(account(model, context=T)).step_flops(depths, 3, T)
    assert (ours < without) == (grad_loops is not None)


def test_more_loops_are_more_flops_by_exactly_their_cost():
    counts = account(CONFIG, context=T)
    use = Utilization(counts)
    loop = use.step_flops([3], 1, T) - use.step_flops([2], 1, T)
    assert loop == pytest.approx(3 * T * counts.per_loop.flops(T))
    assert use.step_flops([2, 4], 2, T) == pytest.approx(use.step_flops([3, 3], 2, T))


def test_a_dense_model_has_no_depths():
    model = DenseTransformer(CONFIG, n_layers=3)
    use = Utilization(account(model, context=T))
    assert use.step_flops(None, 3, T) == pytest.approx(counted(model), rel=0.08)


def test_rates_of_the_steps_since_the_last_line():
    use = Utilization(account(CONFIG), peak_flops=1e6)
    assert use.metrics() == {}
    use.add(seconds=0.5, tokens=100, flops=2e5)
    use.add(seconds=1.5, tokens=100, flops=4e5)
    assert use.metrics() == {"tokens_per_second": 100.0, "flops_per_second": 3e5, "mfu": 0.3}
    use.add(seconds=1.0, tokens=7, flops=1e5)
    assert use.metrics() == {"tokens_per_second": 7.0, "flops_per_second": 1e5, "mfu": 0.1}


def test_without_a_peak_no_utilization_is_given():
    use = Utilization(account(CONFIG))
    use.add(seconds=1.0, tokens=1, flops=1.0)
    assert "mfu" not in use.metrics()


@pytest.mark.parametrize(
    ("name", "dtype", "tflops"),
    [
        ("NVIDIA H100 80GB HBM3", "bfloat16", 989.4), ("NVIDIA H100 PCIe", "bfloat16", 756),
        ("NVIDIA H100 NVL", "float16", 835.5), ("NVIDIA H200", "float32", 66.9),
        ("NVIDIA A100-SXM4-80GB", "bfloat16", 312), ("NVIDIA A10", "bfloat16", 125),
        ("NVIDIA L4", "bfloat16", 121), ("NVIDIA L40S", "bfloat16", 362),
        ("Tesla T4", "float32", 8.1), ("AMD Instinct MI300X", "bfloat16", 1307.4),
    ],
)  # fmt: skip
def test_peaks_by_name(name, dtype, tflops):
    assert device_peak(name, dtype) == pytest.approx(tflops * 1e12)


@pytest.mark.parametrize(
    ("name", "dtype"),
    [("cpu", "float32"), ("", "bfloat16"), ("NVIDIA A10G", "bfloat16"), ("Tesla T4", "bfloat16"),
     ("NVIDIA GeForce RTX 4090", "bfloat16"), ("Apple M3", "float32")],
)  # fmt: skip
def test_what_is_not_known_is_not_guessed(name, dtype):
    assert device_peak(name, dtype) is None


def test_tf32_where_it_is_switched_on():
    assert device_peak("NVIDIA A100-SXM4-40GB", "float32") == 19.5e12
    assert device_peak("NVIDIA A100-SXM4-40GB", "float32", tf32=True) == 156e12
    assert device_peak("Tesla V100-SXM2-16GB", "float32", tf32=True) == 15.7e12


def test_every_peak_has_a_source_and_plausible_ratios():
    for _, peak in PEAKS:
        assert "data sheet" in peak.source or "white paper" in peak.source
        if peak.half is not None and peak.tf32 is not None:
            assert math.isclose(peak.half / peak.tf32, 2, rel_tol=0.05)
        assert peak.float32 < (peak.half or math.inf)
