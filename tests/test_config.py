"""The configuration as data: derived values, round trips, unknown keys. Bad values: test_errors."""

from __future__ import annotations

import json

import pytest
from helpers import small_config

from open_mythos import ConfigError, MythosConfig
from open_mythos.checks import check_count, is_number, nearest, whole


def test_defaults_are_valid():
    MythosConfig().validate()


@pytest.mark.parametrize("attn_type", ["mla", "gqa"])
def test_round_trip_through_json(attn_type):
    cfg = small_config(attn_type, readout=False, norm_eps=1e-5)
    assert MythosConfig.from_dict(json.loads(json.dumps(cfg.to_dict()))) == cfg


def test_missing_keys_take_their_defaults():
    assert MythosConfig.from_dict({"dim": 64, "n_heads": 4}) == MythosConfig(dim=64, n_heads=4)


@pytest.mark.parametrize(
    ("key", "field"),
    [("dims", "dim"), ("n_expert", "n_experts"), ("rope_base", "rope_theta"), ("kv_rank", "kv_")],
)
def test_unknown_key_names_the_nearest(key, field):
    with pytest.raises(ConfigError, match="did you mean") as caught:
        MythosConfig.from_dict({key: 3})
    assert field in caught.value.fix
    assert caught.value.value == key


def test_key_that_is_like_nothing_lists_what_is_known():
    with pytest.raises(ConfigError) as caught:
        MythosConfig.from_dict({"zzzz": 3})
    assert "vocab_size" in caught.value.fix


def test_from_dict_validates():
    with pytest.raises(ConfigError, match="dropout"):
        MythosConfig.from_dict({"dropout": 1.0})


class TestDerived:
    def test_mla(self):
        cfg = MythosConfig()
        assert cfg.rope_dim == 64
        assert cfg.cache_width == 512 + 64

    def test_gqa(self):
        cfg = MythosConfig(attn_type="gqa")
        assert cfg.rope_dim == cfg.head_dim == 128
        assert cfg.cache_width == 2 * 4 * 128

    def test_feed_forward_width(self):
        assert MythosConfig(dim=768).hidden_dim == 1024
        assert MythosConfig(dim=768, ffn_dim=5).hidden_dim == 5

    def test_shared_experts_are_top_k_wide(self):
        cfg = MythosConfig(n_shared_experts=3, n_experts_per_tok=4, expert_dim=10)
        assert cfg.shared_dim == 120

    def test_cache_slots(self):
        cfg = MythosConfig(prelude_layers=2, coda_layers=1, recurrent_layers=3)
        assert cfg.cache_slots(16) == 2 + 3 * 16 + 1
        cfg.kv_share = "last"
        assert cfg.cache_slots(16) == 2 + 3 + 1


class TestHelpers:
    @pytest.mark.parametrize(("value", "expected"), [(3, 3), (0, 0), (-2, -2)])
    def test_whole(self, value, expected):
        assert whole(value) == expected

    @pytest.mark.parametrize("value", [True, 2.0, "2", None, [2], float("nan")])
    def test_not_whole(self, value):
        assert whole(value) is None
        with pytest.raises(ConfigError, match="an integer >= 1"):
            check_count("here", value)

    def test_least(self):
        assert check_count("here", 0, least=0) == 0
        with pytest.raises(ConfigError, match="an integer >= 2"):
            check_count("here", 1, least=2)

    @pytest.mark.parametrize(
        ("value", "expected"),
        [
            (1, True),
            (0.5, True),
            (True, False),
            ("1", False),
            (float("inf"), False),
            (10**400, False),
        ],
    )
    def test_is_number(self, value, expected):
        assert is_number(value) is expected

    def test_nearest(self):
        assert nearest("moe", {"mode", "depth"}) == "did you mean 'mode'?"
        assert nearest("xyz", {"b", "a"}) == "known: a, b"
