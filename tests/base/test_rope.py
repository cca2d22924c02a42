"""Rotary embeddings with every scaling that is read, against transformers and against MiniMind's own formula."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from loraserve.base.config import ModelConfig
from loraserve.base.hf_config import config_from_hf
from loraserve.base.rope import Rope, inverse_frequencies
from tests.base.reference import IDS, SIZES, edit_config, hf_logits, our_logits, our_model, random_hf_model

ROPES: dict[str, dict[str, Any]] = {
    "another theta": {"rope_type": "default", "rope_theta": 300.0},
    "linear": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0},
    "llama3": {
        "rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 16,
    },
    "yarn": {
        "rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 64,
        "beta_fast": 4.0, "beta_slow": 1.0,
    },
    "yarn without a factor on the attention": {
        "rope_type": "yarn", "rope_theta": 1e6, "factor": 16.0, "original_max_position_embeddings": 64,
        "attention_factor": 1.0,
    },
}  # fmt: skip


@pytest.mark.parametrize("name", ROPES)
def test_rope_scaling_is_that_of_transformers(name: str, tmp_path: Path) -> None:
    reference = random_hf_model("llama", rope_parameters=dict(ROPES[name]))
    reference.save_pretrained(tmp_path / "scaled")
    random_hf_model("llama").save_pretrained(tmp_path / "plain")
    ids = IDS * 5  # beyond the original context
    scaled = our_logits(our_model(tmp_path / "scaled"), ids)
    assert (scaled - our_logits(our_model(tmp_path / "plain"), ids)).abs().max() > 0.1
    torch.testing.assert_close(scaled, hf_logits(reference, ids), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ROPES)
def test_rope_fields_of_transformers_4_mean_the_same(name: str, tmp_path: Path) -> None:
    random_hf_model("llama", rope_parameters=dict(ROPES[name])).save_pretrained(tmp_path)
    assert "rope_parameters" in json.loads((tmp_path / "config.json").read_text())
    new = our_logits(our_model(tmp_path), IDS * 5)
    scaling = dict(ROPES[name])
    theta, kind = scaling.pop("rope_theta"), scaling.pop("rope_type")
    old = None if kind == "default" else scaling | {"type": kind}
    edit_config(tmp_path, remove=["rope_parameters"], rope_theta=theta, rope_scaling=old)
    assert torch.equal(our_logits(our_model(tmp_path), IDS * 5), new)


def miniminds_own_frequencies(dim: int, theta: float, scaling: dict[str, Any]) -> torch.Tensor:
    """YaRN as the published model files of MiniMind compute it, dimension by dimension."""

    def dimension(turns: float) -> float:
        return (
            dim * math.log(scaling["original_max_position_embeddings"] / (turns * 2 * math.pi)) / (2 * math.log(theta))
        )

    low = max(math.floor(dimension(scaling["beta_fast"])), 0)
    high = min(math.ceil(dimension(scaling["beta_slow"])), dim // 2 - 1)
    result = []
    for i in range(dim // 2):
        plain = theta ** (-2 * i / dim)
        share = min(max((i - low) / max(high - low, 0.001), 0.0), 1.0)
        result.append(plain * (1 - share) + plain / scaling["factor"] * share)
    return torch.tensor(result)


@pytest.mark.parametrize(("hidden", "heads"), [(768, 8), (512, 8), (640, 8)])
def test_yarn_of_a_minimind_config_is_miniminds(hidden: int, heads: int) -> None:
    scaling = {
        "type": "yarn", "factor": 16, "original_max_position_embeddings": 2048, "beta_fast": 32, "beta_slow": 1,
        "attention_factor": 1.0,
    }  # fmt: skip
    raw = SIZES | {
        "model_type": "minimind", "hidden_size": hidden, "num_attention_heads": heads, "rope_scaling": scaling,
        "rope_theta": 1e6, "head_dim": None,
    }  # fmt: skip
    config = config_from_hf(raw, Path("."), has_qk_norm=False)
    freqs, factor = inverse_frequencies(config)
    plain, _ = inverse_frequencies(config_from_hf(raw | {"rope_scaling": None}, Path("."), has_qk_norm=False))
    assert (freqs / plain).min() < 0.07 and (freqs / plain).max() == 1
    assert factor == 1.0
    torch.testing.assert_close(freqs, miniminds_own_frequencies(hidden // heads, 1e6, scaling))


def test_table_grown_later_holds_the_same_rotations() -> None:
    config = ModelConfig(**{key: SIZES[key] for key in SIZES if not key.endswith("token_id")})
    whole, grown = Rope(config), Rope(config)
    positions = torch.tensor([0, 7, 199])
    wanted = whole(positions, 200)
    grown(torch.arange(8), 8)
    for got, want in zip(grown(positions, 200), wanted, strict=True):
        assert torch.equal(got, want)
