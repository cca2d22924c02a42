"""Adapters that would do nothing, or the wrong thing, or harm: each is refused, with every problem in one message."""

import json
import struct
import tracemalloc
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from loraserve.errors import AdapterRefused
from loraserve.lora.adapter import Adapter, LoraWeight, find_size_problems, find_value_problems
from loraserve.lora.peft import read_adapter, scan_adapter, write_adapter

Q = "base_model.model.model.layers.0.self_attn.q_proj"
V = "base_model.model.model.layers.0.self_attn.v_proj"


@pytest.fixture
def folder(shapes, make_adapter, lora, tmp_path) -> Path:
    write_adapter(tmp_path / "good", make_adapter(shapes, lora()), lora())
    read_adapter(tmp_path / "good", "good", shapes)  # sound before each test spoils it
    return tmp_path / "good"


def change(folder: Path, **tensors: torch.Tensor | None) -> None:
    """Replace tensors of the weights file; None removes one. Keys are given with the prefix's dots as in the file."""
    file = folder / "adapter_model.safetensors"
    state = load_file(file) | tensors
    save_file({key: tensor for key, tensor in state.items() if tensor is not None}, file)


def refusal(folder: Path, shapes) -> list[str]:
    with pytest.raises(AdapterRefused) as refused:
        read_adapter(folder, "spoilt", shapes)
    assert str(refused.value).startswith("adapter 'spoilt' refused: ")
    return refused.value.problems


def test_header_that_claims_two_gigabytes_allocates_nothing(folder, shapes):
    (folder / "adapter_model.safetensors").write_bytes(struct.pack("<Q", 2 << 30) + b'{"a":' + b" " * 100)
    tracemalloc.start()
    problems = refusal(folder, shapes)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert "its header claims 2147483648 bytes, the file has 113" in problems[0]
    assert peak < 1 << 20


def test_tensor_that_claims_more_than_the_file_holds_is_refused(folder, shapes):
    entry = {"dtype": "F32", "shape": [1 << 20, 1 << 20], "data_offsets": [0, 4 << 40]}
    header = json.dumps({f"{Q}.lora_A.weight": entry}).encode()
    (folder / "adapter_model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + b"\0" * 64)
    assert "describes 4398046511104 bytes of tensors, the file has 64" in refusal(folder, shapes)[0]


@pytest.mark.parametrize("keep", [0, 3, 8, 200, -1])
def test_truncated_weights_are_refused(folder, shapes, keep):
    file = folder / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    assert "cut short" in refusal(folder, shapes)[0]


def test_trailing_bytes_are_refused(folder, shapes):
    file = folder / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes() + b"x")
    assert "damaged" in refusal(folder, shapes)[0]


@pytest.mark.parametrize("zipped", [True, False])
def test_pickle_under_the_name_of_the_weights_is_never_opened(folder, shapes, zipped):
    torch.save({"a": torch.ones(1)}, folder / "adapter_model.safetensors", _use_new_zipfile_serialization=zipped)
    assert "pickle" in refusal(folder, shapes)[0]


def test_pickled_weights_are_refused_with_the_way_to_convert_them(folder, shapes):
    (folder / "adapter_model.safetensors").unlink()
    torch.save({}, folder / "adapter_model.bin")
    problem = refusal(folder, shapes)[0]
    assert "adapter_model.bin is a pickle" in problem
    assert "convert" in problem


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "adapter_config.json"])
def test_missing_or_linked_files_are_refused(folder, shapes, name, tmp_path):
    (folder / name).rename(tmp_path / "elsewhere")
    assert f"{name}" in refusal(folder, shapes)[0]
    (folder / name).symlink_to(tmp_path / "elsewhere")
    assert f"{name} cannot be opened (it is a symlink)" in refusal(folder, shapes)[0]
    (folder / name).unlink()
    (folder / name).mkdir()
    assert name in refusal(folder, shapes)[0]


@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b"\xff\xfe", b"[" * 100_000, b"null"])
def test_config_that_is_not_a_json_object_is_refused(folder, shapes, content):
    (folder / "adapter_config.json").write_bytes(content)
    assert "adapter_config.json is not" in refusal(folder, shapes)[0]


@pytest.mark.parametrize(
    "header",
    [
        b"[]",
        b"null",
        b"{",
        b'{"a": 1}',
        b'{"a": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}}',
        b"[" * 50_000,
    ],
)
def test_header_that_is_not_of_the_format_is_refused(folder, shapes, header):
    (folder / "adapter_model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + b"\0" * 4)
    assert "header" in refusal(folder, shapes)[0]


def test_nan_and_infinity_are_refused(folder, shapes):
    change(folder, **{f"{Q}.lora_A.weight": torch.full((4, 32), float("nan"))})
    change(folder, **{f"{V}.lora_B.weight": torch.full((16, 4), float("inf"))})
    assert refusal(folder, shapes) == [
        "model.layers.0.self_attn.q_proj: lora_A contains NaN or Inf",
        "model.layers.0.self_attn.v_proj: lora_B contains NaN or Inf",
    ]


def test_zero_b_everywhere_is_refused_but_one_nonzero_layer_is_enough(folder, shapes):
    state = load_file(folder / "adapter_model.safetensors")
    zeros = {key: torch.zeros_like(t) for key, t in state.items() if ".lora_B." in key}
    change(folder, **zeros)
    assert "every lora_B is zero" in refusal(folder, shapes)[0]
    change(folder, **{f"{Q}.lora_B.weight": state[f"{Q}.lora_B.weight"]})
    read_adapter(folder, "good", shapes)


def test_adapter_of_another_base_names_shapes_of_both(folder, shapes):
    other = {target: (2 * out, 2 * width) for target, (out, width) in shapes.items()}
    problems = refusal(folder, other)
    assert len(problems) == 2  # all q_proj in one line, all v_proj in another
    assert "q_proj: made for a layer of shape (32, 32), this base has (64, 64)" in problems[0]


def test_unknown_target_is_named(folder, shapes):
    less = {target: shape for target, shape in shapes.items() if "layers.1" not in target}
    problem = refusal(folder, less)[0]
    assert "no linear layer model.layers.1.self_attn.q_proj, model.layers.1.self_attn.v_proj" in problem


LEFT_OVER = {
    "base_model.model.model.embed_tokens.lora_embedding_A": "an adapter on embeddings",
    "base_model.model.model.embed_tokens.weight": "retrained or resized embeddings",
    "base_model.model.model.layers.0.mlp.experts.base_layer.lora_A.weight": "an adapter on fused experts",
    f"{Q}.lora_B.bias": "lora_bias",
    "base_model.model.lm_head.modules_to_save.weight": "retrained modules",
    f"{Q}.lora_A.default.weight": "PEFT's begin with",
    "model.layers.0.self_attn.k_proj.lora_A.weight": "PEFT's begin with",
}


@pytest.mark.parametrize("key", LEFT_OVER)
def test_keys_left_over_are_refused_with_what_they_are(folder, shapes, key):
    change(folder, **{key: torch.ones(2, 2)})
    problem = next(p for p in refusal(folder, shapes) if key in p)
    assert LEFT_OVER[key] in problem


def test_half_a_pair_is_refused(folder, shapes):
    change(folder, **{f"{Q}.lora_B.weight": None})
    assert refusal(folder, shapes) == ["missing: model.layers.0.self_attn.q_proj.lora_B"]


@pytest.mark.parametrize("shape", [(4,), (3, 32), (0, 32), (4, 32, 1)])
def test_a_that_does_not_fit_its_b_is_refused(folder, shapes, shape):
    change(folder, **{f"{Q}.lora_A.weight": torch.ones(shape)})
    assert any("do not fit" in problem for problem in refusal(folder, shapes))


def test_integers_are_refused(folder, shapes):
    change(folder, **{f"{Q}.lora_A.weight": torch.ones(4, 32, dtype=torch.int32)})
    assert any("must be float32" in problem for problem in refusal(folder, shapes))


def test_double_precision_is_read_as_float32(folder, shapes):
    state = load_file(folder / "adapter_model.safetensors")
    change(folder, **{key: tensor.double() for key, tensor in state.items()})
    adapter, _ = read_adapter(folder, "good", shapes)
    assert torch.equal(adapter.weights["model.layers.0.self_attn.q_proj"].A, state[f"{Q}.lora_A.weight"])


def test_rank_and_targets_must_be_those_of_the_config(folder, shapes):
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(config | {"r": 8, "target_modules": ["q_proj"]}))
    first, second = refusal(folder, shapes)
    assert "weights for layers that target_modules does not name: model.layers.0.self_attn.v_proj" in first
    assert "model.layers.0.self_attn.q_proj has rank 4, adapter_config.json says 8" in second


def test_magnitudes_and_use_dora_must_fit(folder, shapes):
    vectors = {
        f"base_model.model.{t}.lora_magnitude_vector": torch.ones(shapes[t][0]) for t in read_adapter(folder)[0].weights
    }
    last = list(vectors)[-1]
    change(folder, **vectors)
    assert "does not say use_dora" in refusal(folder, shapes)[0]
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(config | {"use_dora": True}))
    assert read_adapter(folder, "x", shapes)[0].is_dora
    change(folder, **{last: None})
    assert "use_dora needs a lora_magnitude_vector, which is missing for" in refusal(folder, shapes)[0]
    change(folder, **{last: torch.ones(5)})
    assert "lora_magnitude_vector (5,) and lora_B" in refusal(folder, shapes)[0]
    change(folder, **{last: torch.full_like(vectors[last], float("inf"))})
    assert "lora_magnitude_vector contains NaN or Inf" in refusal(folder, shapes)[0]


def test_problems_of_config_header_and_values_come_together(folder, shapes):
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(config | {"bias": "all", "lora_bias": True}))
    bad = {f"{Q}.lora_A.weight": torch.full((4, 32), float("nan")), f"{V}.lora_B.weight": torch.ones(17, 4)}
    change(folder, **bad, unknown=torch.ones(1))
    text = "; ".join(refusal(folder, shapes))
    for part in ("bias='all'", "lora_bias", "NaN", "(17, 32)", "unknown"):
        assert part in text


def test_layers_that_the_config_names_but_the_file_lacks_are_a_warning(folder, shapes):
    change(folder, **{f"{Q}.lora_A.weight": None, f"{Q}.lora_B.weight": None})
    read_adapter(folder, "good", shapes)
    assert "no weights for model.layers.0.self_attn.q_proj" in scan_adapter(folder, "good", shapes).warnings[0]


@pytest.mark.parametrize(
    "field", ["target_modules", "exclude_modules", "rank_pattern", "alpha_pattern", "layers_pattern"]
)
def test_regex_that_backtracks_without_end_is_given_up(folder, shapes, field):
    endless = r"((.|..)+)+\d[a-z]\d"
    value = {endless: 4} if field in ("rank_pattern", "alpha_pattern") else endless
    config = json.loads((folder / "adapter_config.json").read_text()) | {field: value}
    if field == "layers_pattern":
        config["layers_to_transform"] = [0]
    (folder / "adapter_config.json").write_text(json.dumps(config))
    if field == "alpha_pattern":  # only values are scaled, so a look at the header alone does not meet it
        scan_adapter(folder, "spoilt", shapes)
    assert "takes too long" in refusal(folder, shapes)[0]


def test_weights_with_another_hash_are_refused(folder, shapes):
    with pytest.raises(AdapterRefused, match="sha256"):
        read_adapter(folder, "good", shapes, sha256="0" * 64)


def test_path_that_is_no_directory_is_refused(shapes, tmp_path):
    assert "is not a directory" in refusal(tmp_path / "nowhere", shapes)[0]


def test_config_that_does_not_describe_the_adapter_is_not_written(shapes, make_adapter, lora, tmp_path):
    adapter = make_adapter(shapes, lora())
    for config in (lora(r=8), lora(lora_alpha=9), lora(["q_proj"])):
        with pytest.raises(AdapterRefused):
            write_adapter(tmp_path / "x", adapter, config)
    assert not (tmp_path / "x").exists()


def test_adapter_in_memory_is_checked_the_same_way(shapes, make_adapter, lora):
    def find_problems(adapter):
        sizes = {target: (tuple(w.A.shape), tuple(w.B.shape)) for target, w in adapter.weights.items()}
        return find_size_problems(sizes, shapes) + find_value_problems(adapter)

    good = make_adapter(shapes, lora())
    assert not find_problems(good)
    target = "model.layers.0.self_attn.q_proj"
    spoilt = dict(good.weights) | {
        target: LoraWeight(torch.full((4, 32), float("nan")), good.weights[target].B, 1.0),
        "model.layers.9.self_attn.q_proj": good.weights[target],
        "lm_head": LoraWeight(torch.ones(2, 32), torch.ones(96, 2), 1.0),
    }
    unknown, shape, value = find_problems(Adapter(spoilt))
    assert "no linear layer model.layers.9" in unknown and "lm_head" in shape and "NaN" in value
    assert find_problems(Adapter({})) == ["it has no weights"]
