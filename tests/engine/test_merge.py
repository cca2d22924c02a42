"""Merged checkpoints: the arithmetic, upstream's own merged files, transformers' reading of them, and the report."""

import hashlib
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from loraserve.base.attention import PackedAttention
from loraserve.base.checkpoint import read_checkpoint
from loraserve.base.fingerprint import compute
from loraserve.base.load import Base, build_model, load_base
from loraserve.engine.merge import merge, merge_checkpoint
from loraserve.engine.parity import compare
from loraserve.errors import AdapterNotFound, CheckpointError, Conflict, InvalidRequest, StorageError
from loraserve.lora.adapter import Adapter, LoraWeight
from loraserve.lora.batch import LoraBatch
from loraserve.lora.config import LoraConfig
from loraserve.lora.minimind import read_minimind
from loraserve.lora.spec import parse_spec
from loraserve.lora.stack import AdapterStack
from loraserve.registry import Registry
from tests.engine.conftest import write_random

TEXT = "Tell me a story. 给我讲一个故事吧。"


def unmerged_logits(base: Base, registry: Registry, spec: str) -> Tensor:
    """(T, vocab) of TEXT from the base with the adapters of `spec`, as they are served."""
    ids = base.tokenizer.encode(TEXT)
    terms = parse_spec(spec)
    stack = AdapterStack([registry.load(term.name).weights for term in terms])
    lora = LoraBatch.from_segments(stack, [(len(ids), [(i, term.scale) for i, term in enumerate(terms)])], "cpu")
    attention = PackedAttention([len(ids)])
    return base.model(torch.tensor(ids), attention.positions, attention, lora)


def transformers_logits(folder: Path, ids: list[int]) -> Tensor:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, local_files_only=True)
    with torch.no_grad():
        return model(torch.tensor([ids])).logits[0]


def hashes(folder: Path) -> dict[str, str]:
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in folder.iterdir()}


def publish(base: Base, root: Path, adapter: Adapter, r: int) -> Registry:
    """A registry with one adapter, named `one`."""
    registry = Registry(root, base.shapes, base.fingerprint)
    config = LoraConfig(r=r, lora_alpha=2 * r, target_modules=sorted(adapter.weights))
    registry.publish("one", adapter, config, {"base_fingerprint": base.fingerprint})
    return registry


@pytest.mark.parametrize("spec", ["a", "b", "c", "b:0.5", "a:0.7+b:0.3+c:-0.4"])
def test_transformers_computes_from_the_merged_directory_what_base_and_adapters_compute(
    base: Base, registry: Registry, tmp_path: Path, spec: str
) -> None:
    done = merge(base, registry, parse_spec(spec), tmp_path / "merged")
    expected = unmerged_logits(base, registry, spec)
    got = transformers_logits(done.path, base.tokenizer.encode(TEXT))
    alone = transformers_logits(base.path, base.tokenizer.encode(TEXT))
    assert (expected - alone).abs().max() > 1
    torch.testing.assert_close(got, expected, atol=0.02, rtol=0)
    assert done.untied == ("c" in spec)


def test_experts_router_and_attention_of_a_mixture_are_merged(moe: Base, random_adapter, tmp_path: Path) -> None:
    targets = ["gate_proj", "up_proj", "down_proj", "gate", "k_proj"]
    registry = publish(moe, tmp_path / "adapters", random_adapter(moe.shapes, targets, 3, 1), 3)
    done = merge(moe, registry, parse_spec("one:0.6"), tmp_path / "merged")
    assert done.num_layers == 2 * (4 * 3 + 2)
    expected = unmerged_logits(moe, registry, "one:0.6")
    got = transformers_logits(done.path, moe.tokenizer.encode(TEXT))
    assert (expected - transformers_logits(moe.path, moe.tokenizer.encode(TEXT))).abs().max() > 0.5
    torch.testing.assert_close(got, expected, atol=0.02, rtol=0)
    assert done.parity.greedy_agreement > 0.9


@pytest.mark.parametrize("kind", ["dense", "moe"])
def test_merged_weights_are_those_of_upstreams_own_merged_file(conformance: Path, kind: str) -> None:
    folder, suffix = conformance / f"minimind-3-{kind}", "_moe" if kind == "moe" else ""
    base = read_checkpoint(folder / f"full_sft_64{suffix}.pth")
    adapter = read_minimind(folder / f"lora_identity_64{suffix}.pth", "identity")
    upstream = read_checkpoint(folder / f"merged_lora_identity_64{suffix}.pth")
    merged = merge_checkpoint(base, [(adapter, 1.0)])
    assert merged.tensors.keys() == upstream.tensors.keys()
    for name, theirs in upstream.tensors.items():
        target = name.removesuffix(".weight")
        if target not in adapter.weights:
            assert torch.equal(merged.tensors[name], theirs)
            continue
        weight, delta = base.tensors[name].float(), adapter.weights[target].delta()
        assert delta.abs().max() > 1e-3
        distance = (merged.tensors[name].float() - theirs.float()).abs()
        assert (distance <= 2**-9 * (weight.abs() + delta.abs())).all()
        assert torch.equal(merged.tensors[name], (weight + delta).half())


@pytest.mark.parametrize("kind", ["dense", "moe"])
def test_minimind_files_are_merged_into_a_file_that_computes_the_same(
    conformance: Path, tmp_path: Path, kind: str
) -> None:
    folder, suffix = conformance / f"minimind-3-{kind}", "_moe" if kind == "moe" else ""
    tokenizer = str(conformance / "minimind-3-tokenizer")
    base = load_base(str(folder / f"full_sft_64{suffix}.pth"), tokenizer=tokenizer, device="cpu", dtype="float32")
    registry = Registry(tmp_path / "adapters", base.shapes, base.fingerprint)
    registry.import_(folder / f"lora_identity_64{suffix}.pth", "identity")
    done = merge(base, registry, parse_spec("identity"), tmp_path / "merged_64.pth", "minimind")
    state = torch.load(done.path, weights_only=True)
    assert state["lm_head.weight"].dtype == torch.float16
    assert torch.equal(state["lm_head.weight"], state["model.embed_tokens.weight"])
    assert done.report_path == tmp_path / "merged_64.merge_report.json"
    assert done.parity.greedy_agreement > 0.95
    assert 0 < done.parity.max_logit_difference < 0.02 * done.parity.max_logit


def test_the_base_is_untouched(base: Base, registry: Registry, tmp_path: Path) -> None:
    files = hashes(base.path)
    weights = {name: tensor.clone() for name, tensor in base.model.state_dict().items()}
    checkpoint = read_checkpoint(base.path)
    before = compute(checkpoint)
    adapters = [(registry.load(name), 1.0) for name in "abc"]
    changed = merge_checkpoint(checkpoint, adapters)
    merge(base, registry, parse_spec("a+b+c"), tmp_path / "merged")
    assert compute(changed) != before == compute(checkpoint) == base.fingerprint
    assert hashes(base.path) == files
    assert all(torch.equal(tensor, weights[name]) for name, tensor in base.model.state_dict().items())
    assert base.model.lm_head.weight is base.model.model.embed_tokens.weight


def test_an_adapter_on_a_tied_head_unties_it_and_leaves_the_embeddings_alone(
    base: Base, registry: Registry, tmp_path: Path
) -> None:
    assert base.config.tie_word_embeddings
    merge(base, registry, parse_spec("c"), tmp_path / "merged")
    assert json.loads((tmp_path / "merged" / "config.json").read_text())["tie_word_embeddings"] is False
    before, after = load_file(base.path / "model.safetensors"), load_file(tmp_path / "merged" / "model.safetensors")
    assert torch.equal(after["model.embed_tokens.weight"], before["model.embed_tokens.weight"])
    assert not torch.equal(after["lm_head.weight"], before["model.embed_tokens.weight"])
    with pytest.raises(CheckpointError, match="ties lm_head"):
        merge(base, registry, parse_spec("c"), tmp_path / "merged.pth", "minimind")
    assert sorted(file.name for file in tmp_path.iterdir()) == ["merged"]


def test_a_sum_is_rounded_once_whatever_the_file_and_the_format(tiny_base_dir: Path, tmp_path: Path) -> None:
    """Merging a bfloat16 base for MiniMind must not round to bfloat16 on the way to float16."""
    config = read_checkpoint(tiny_base_dir).config
    checkpoint = read_checkpoint(write_random(config, tiny_base_dir, tmp_path / "bf16", torch.bfloat16))
    target = "model.layers.0.self_attn.q_proj"
    generator = torch.Generator().manual_seed(1)
    weight = LoraWeight(torch.randn(4, 64, generator=generator), torch.randn(64, 4, generator=generator) * 0.01, 0.5)
    exact = checkpoint.tensors[f"{target}.weight"].float() + weight.delta()
    adapters = [(Adapter({target: weight}), 1.0)]
    kept = merge_checkpoint(checkpoint, adapters).tensors[f"{target}.weight"]
    half = merge_checkpoint(checkpoint, adapters, torch.float16).tensors[f"{target}.weight"]
    assert torch.equal(kept, exact.bfloat16())
    assert torch.equal(half, exact.half())
    assert not torch.equal(half, exact.bfloat16().half())


def test_the_report_is_written_beside_the_weights_and_says_what_was_merged(
    base: Base, registry: Registry, tmp_path: Path
) -> None:
    done = merge(base, registry, parse_spec("a:0.7+b:0.3"), tmp_path / "merged")
    assert done.report_path == tmp_path / "merged" / "merge_report.json"
    report = json.loads(done.report_path.read_text("utf-8"))
    assert report["adapter"] == "a:0.7+b:0.3"
    assert report["base"]["fingerprint"] == base.fingerprint != report["merged"]["fingerprint"]
    assert report["merged"]["fingerprint"] == compute(read_checkpoint(done.path))
    assert [part["sha256"] for part in report["adapters"]] == [registry.load(name).digest for name in "ab"]
    parity = report["parity"]
    assert parity["greedy_tokens"] == sum(probe["tokens"] for probe in parity["prompts"]) > 20
    assert parity["greedy_agreement"] > 0.9
    assert 0 < parity["max_logit_difference"] < 0.05 < parity["max_logit"]
    assert any("一" <= letter <= "龥" for probe in parity["prompts"] for letter in probe["prompt"])


def test_the_comparison_notices_a_checkpoint_that_is_not_the_merged_one(base: Base, registry: Registry) -> None:
    unmerged = build_model(read_checkpoint(base.path), base.device, base.dtype)
    parity = compare(base, [(registry.load("b"), 1.0)], unmerged)
    assert parity.greedy_agreement < 0.5
    assert parity.max_logit_difference > 1


def test_the_comparison_renders_the_bases_own_template(base: Base, registry: Registry, tmp_path: Path) -> None:
    """With another template the answers are others."""
    twin = shutil.copytree(base.path, tmp_path / "twin")
    settings = json.loads((twin / "tokenizer_config.json").read_text("utf-8"))
    settings["chat_template"] = "{% for m in messages %}{{ m.content }}{% endfor %} Answer:"
    (twin / "tokenizer_config.json").write_text(json.dumps(settings), "utf-8")
    other = load_base(str(twin), device="cpu", dtype="float32")
    adapters = [(registry.load("b"), 1.0)]
    merged = build_model(merge_checkpoint(read_checkpoint(base.path), adapters), base.device, base.dtype)
    answers = [[p.answer for p in compare(b, adapters, merged, ["你是谁？"]).prompts] for b in (base, other)]
    assert answers[0] != answers[1]


def test_a_merged_directory_serves_as_a_base(base: Base, registry: Registry, tmp_path: Path) -> None:
    done = merge(base, registry, parse_spec("b"), tmp_path / "merged")
    merged = load_base(str(done.path), device="cpu", dtype="float32")
    assert merged.fingerprint == done.fingerprint
    expected = unmerged_logits(base, registry, "b")
    torch.testing.assert_close(unmerged_logits(merged, registry, "base"), expected, atol=0.02, rtol=0)


@pytest.mark.parametrize("spec", ["base", "a:0", "base:3"])
def test_a_spec_that_changes_nothing_is_refused(base: Base, registry: Registry, tmp_path: Path, spec: str) -> None:
    with pytest.raises(InvalidRequest, match="would change nothing"):
        merge(base, registry, parse_spec(spec), tmp_path / "merged")
    assert not list(tmp_path.iterdir())


def test_a_weight_beyond_float16_is_refused_by_name(
    base: Base, registry: Registry, tmp_path: Path, random_adapter
) -> None:
    huge = random_adapter(base.shapes, ["k_proj"], 2, 0)
    huge = Adapter({t: LoraWeight(w.A * 1000, w.B * 1000, w.scaling) for t, w in huge.weights.items()})
    strong = publish(base, tmp_path / "adapters", huge, 2)
    with pytest.raises(CheckpointError, match=r"k_proj is beyond the range of torch.float16"):
        merge(base, strong, parse_spec("one"), tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


@pytest.mark.parametrize("form", ["hf", "minimind"])
def test_what_exists_is_not_overwritten(base: Base, registry: Registry, tmp_path: Path, form: str) -> None:
    out = tmp_path / "out.pth"
    out.write_text("mine")
    with pytest.raises(Conflict, match="exists already"):
        merge(base, registry, parse_spec("a"), out, form)
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "notes").write_text("mine")
    with pytest.raises(Conflict):
        merge(base, registry, parse_spec("a"), folder, form)
    assert out.read_text() == (folder / "notes").read_text() == "mine"
    assert len(list(tmp_path.iterdir())) == 2


def test_an_empty_directory_may_be_filled(base: Base, registry: Registry, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    merge(base, registry, parse_spec("a"), tmp_path / "out")
    assert (tmp_path / "out" / "model.safetensors").exists()


def test_an_unknown_adapter_leaves_nothing_behind(base: Base, registry: Registry, tmp_path: Path) -> None:
    with pytest.raises(AdapterNotFound):
        merge(base, registry, parse_spec("a+nobody"), tmp_path / "merged")
    assert not list(tmp_path.iterdir())


def test_a_place_that_cannot_be_written_is_reported_by_its_name(base: Base, registry: Registry, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a directory")
    with pytest.raises(StorageError, match=r"file/merged could not be written"):
        merge(base, registry, parse_spec("a"), tmp_path / "file" / "merged")


def test_a_base_whose_files_changed_since_it_was_loaded_is_refused(
    base: Base, registry: Registry, tmp_path: Path
) -> None:
    twin = shutil.copytree(base.path, tmp_path / "twin")
    loaded = load_base(str(twin), device="cpu", dtype="float32")
    tensors = load_file(twin / "model.safetensors")
    tensors["model.norm.weight"] = tensors["model.norm.weight"] * 2
    save_file(tensors, twin / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match="have changed"):
        merge(loaded, registry, parse_spec("a"), tmp_path / "merged")
    assert not (tmp_path / "merged").exists()
