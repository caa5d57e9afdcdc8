"""Reusable layers refuse what only a configuration would have refused."""

from __future__ import annotations

import pytest
import torch
from helpers import random_ids, small_config, small_model

from open_mythos import ConfigError, LTIInjection, RMSNorm
from open_mythos.model.layers.injection import ConcatInjection
from open_mythos.ops.rope import precompute_rope_freqs, rope_table

BAD = {
    "a rule": lambda: LTIInjection(8, "tustin"),
    "half a matrix": lambda: LTIInjection(8, "zoh", "half"),
    "another matrix": lambda: ConcatInjection(8, "half"),
    "a negative eps": lambda: RMSNorm(8, -1.0),
    "no theta": lambda: rope_table(torch.arange(4), 8, 0.0),
    "a negative theta": lambda: precompute_rope_freqs(8, 4, -1.0),
    "loops for ever": lambda: next(small_model().unroll(random_ids(1, 4), 10**30)),
    "a loop count for ever": lambda: small_config(max_loop_iters=10**12).validate(),
    "layers for ever": lambda: small_config(prelude_layers=10**7).validate(),
}


@pytest.mark.parametrize("name", BAD)
def test_it_is_refused(name):
    with pytest.raises(ConfigError) as found:
        BAD[name]()
    error = found.value
    assert all((error.what, error.where, error.value is not None, error.allowed, error.fix))
