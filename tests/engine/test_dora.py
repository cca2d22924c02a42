"""DoRA adapters that PEFT saved: its logits, alone, mixed and blended, and merged; every case with dense arithmetic."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import peft
import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from loraserve.base.attention import PackedAttention
from loraserve.base.load import Base, build_model, load_base
from loraserve.engine.adapter_tiers import AdapterTiers
from loraserve.engine.merge import merge, merge_checkpoint, read_pristine
from loraserve.engine.params import SamplingParams
from loraserve.engine.service import Service
from loraserve.errors import AdapterRefused
from loraserve.kernels import gemm
from loraserve.lora.adapter import Adapter
from loraserve.lora.batch import LoraBatch
from loraserve.lora.config import LoraConfig
from loraserve.lora.dora import prepared
from loraserve.lora.packed import Packed
from loraserve.lora.peft import read_adapter, write_adapter
from loraserve.lora.spec import parse_spec
from loraserve.lora.stack import AdapterStack
from loraserve.registry import Registry
from loraserve.train.compare import measure
from loraserve.train.general import perplexity

pytestmark = [
    pytest.mark.filterwarnings(f"ignore:{start}")
    for start in (
        "`is_gradient_checkpointing` is deprecated",
        "Model has `tie_word_embeddings=True`",
        "Model with `tie_word_embeddings=True`",
        "Setting `save_embedding_layers` to `True`",
        "Could not find a config file",
    )
]
IDS = [5, 6, 7, 80, 90, 12, 33, 5]
TARGETS = {"d": ["q_proj", "up_proj", "down_proj", "lm_head"], "e": ["k_proj", "v_proj", "down_proj"]}
SPECS = ["base", "d", "a", "e", "d:0.5+e:-0.7", "d+b:0.6", "base", "c"]


@pytest.fixture(scope="module")
def theirs(tiny_base_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Tensor]]:
    """PEFT's DoRA adapters with magnitudes far from the norms, and its logits (T, vocab)."""
    made = {}
    for seed, (name, targets) in enumerate(TARGETS.items()):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_pretrained(tiny_base_dir, dtype=torch.float32, local_files_only=True)
        config = peft.LoraConfig(
            r=3 + seed,
            lora_alpha=5,
            target_modules=targets,
            use_dora=True,
            use_rslora=bool(seed),
            init_lora_weights=False,
            task_type="CAUSAL_LM",
        )
        wrapped = peft.get_peft_model(model, config).eval()
        with torch.no_grad():
            for key, value in wrapped.named_parameters():
                if "lora_magnitude" in key:
                    value.mul_(torch.rand_like(value) + 0.6)
                elif "lora_" in key:
                    value.copy_(torch.randn_like(value) * 0.15)
            logits = wrapped(torch.tensor([IDS])).logits[0]
        wrapped.save_pretrained(folder := tmp_path_factory.mktemp("peft") / name)
        made[name] = folder, logits
    return made


@pytest.fixture
def dora_registry(base: Base, registry: Registry, theirs, tmp_path: Path) -> Registry:
    mine = Registry(tmp_path / "adapters", base.shapes, base.fingerprint)
    for name, (folder, _) in theirs.items():
        mine.import_(folder, name)
    for name in ("a", "b", "c"):
        mine.import_(registry.get(name).path, name)
    return mine


@pytest.fixture(params=[True, False], ids=["kernels", "no kernels"])
def dora_service(
    request, base: Base, tiny_base_dir: Path, dora_registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Service]:
    if not request.param:
        monkeypatch.setenv("LORASERVE_KERNELS", "off")
        base = load_base(str(tiny_base_dir), device="cpu", dtype="float32")
    service = Service(base, dora_registry, max_model_len=192, max_num_seqs=16)
    service.start()
    yield service
    service.stop()


def dense_logits(base: Base, folder: Path, registry: Registry, spec: str) -> Tensor:
    """(T, vocab) of a base whose weights are W + Σ w (m (W + ΔW) / ‖W + ΔW‖ - W), written out."""
    model = load_base(str(folder), device="cpu", dtype="float32").model
    changes: dict[str, Tensor] = {}
    for term in parse_spec(spec):
        for target, update in registry.load(term.name).weights.items():
            W = base.weight_of(target)
            moved = W + update.scaling * update.B @ update.A
            if update.magnitude is not None:
                moved = update.magnitude[:, None] * moved / moved.square().sum(1, keepdim=True).sqrt()
            changes[target] = changes.get(target, 0) + term.scale * (moved - W)
    for target, change in changes.items():
        layer = model.get_submodule(target)
        layer.weight = torch.nn.Parameter(layer.weight + change, requires_grad=False)
    attention = PackedAttention([len(IDS)])
    with torch.no_grad():
        return model(torch.tensor(IDS), attention.positions, attention, None)


def test_logits_are_peft_s(dora_service: Service, theirs) -> None:
    plain = dora_service.logits(IDS)
    for name, (_, expected) in theirs.items():
        assert (expected - plain).abs().max() > 0.1, "this adapter does nothing"
        torch.testing.assert_close(dora_service.logits(IDS, parse_spec(name)), expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("spec", ["d:0.5+e:-0.7", "d+b:0.6"])
def test_a_blend_is_that_of_dense_weights(dora_service: Service, tiny_base_dir: Path, spec: str) -> None:
    expected = dense_logits(dora_service.base, tiny_base_dir, dora_service.registry, spec)
    assert (expected - dora_service.logits(IDS, parse_spec("d"))).abs().max() > 0.1
    torch.testing.assert_close(dora_service.logits(IDS, parse_spec(spec)), expected, rtol=1e-3, atol=1e-3)


def test_rows_of_a_mixed_batch_are_those_alone(dora_service: Service) -> None:
    params = SamplingParams(max_tokens=8, temperature=0.0, ignore_eos=True, logprobs=5)

    def tops(generations) -> list[list[tuple[int, float]]]:
        return [[(t.token_id, t.logprob) for p in g for t in p.logprobs] for g in generations]

    alone = [tops([dora_service.generate(IDS, parse_spec(spec), params)])[0] for spec in SPECS]
    mixed = tops([dora_service.generate(IDS, parse_spec(spec), params) for spec in SPECS])
    for one, other in zip(alone, mixed, strict=True):
        assert [token for token, _ in one] == [token for token, _ in other]
        torch.testing.assert_close(
            torch.tensor([p for _, p in one]), torch.tensor([p for _, p in other]), rtol=0, atol=1e-4
        )
    assert len({tuple(p for _, p in one) for one in alone}) == len(set(SPECS))


def test_bfloat16_stays_near_float32(tiny_base_dir: Path, dora_registry: Registry, theirs) -> None:
    service = Service(load_base(str(tiny_base_dir), device="cpu", dtype="bfloat16"), dora_registry, max_model_len=64)
    service.start()
    try:
        for name, (_, expected) in theirs.items():
            got = service.logits(IDS, parse_spec(name))
            assert (got - expected).norm() < 0.05 * expected.norm()
            assert (service.logits(IDS) - expected).norm() > 0.2 * expected.norm()
    finally:
        service.stop()


def test_merged_is_peft_s(base: Base, dora_registry: Registry, theirs, tmp_path: Path) -> None:
    done = merge(base, dora_registry, parse_spec("d"), tmp_path / "merged")
    assert done.untied
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32, local_files_only=True)
    with torch.no_grad():
        got = merged(torch.tensor([IDS])).logits[0]
    torch.testing.assert_close(got, theirs["d"][1], rtol=1e-2, atol=1e-2)  # stored in float16
    assert done.parity.max_logit_difference < 1e-2 * done.parity.max_logit


def test_hot_merged_is_unmerged(dora_service: Service, theirs) -> None:
    dora_service.merges.merge("e")
    merged = dora_service.logits(IDS, parse_spec("e"))
    torch.testing.assert_close(merged, theirs["e"][1], rtol=1e-3, atol=1e-3)


def test_written_again_it_is_the_same(base: Base, theirs, tmp_path: Path) -> None:
    adapter, config = read_adapter(theirs["d"][0], "d", base.shapes)
    write_adapter(tmp_path, adapter, config)
    again, config_again = read_adapter(tmp_path, "d", base.shapes)
    assert again.digest == adapter.digest and config_again == config and config.use_dora
    with pytest.raises(AdapterRefused, match="magnitude"):
        write_adapter(tmp_path, adapter, LoraConfig(r=3, lora_alpha=5, target_modules=TARGETS["d"]))


def test_size_and_digest_count_the_magnitudes(base: Base, dora_registry: Registry) -> None:
    record, adapter = dora_registry.get("d"), dora_registry.load("d")
    packed = Packed.of(prepared(adapter, base.weight_of), torch.float32).adapter
    assert packed.num_bytes == adapter.num_bytes == 4 * record.num_parameters
    louder = {t: type(w)(w.A, w.B, w.scaling, 2 * w.magnitude) for t, w in adapter.weights.items()}
    other = Packed.of(prepared(Adapter(louder, "d"), base.weight_of), torch.float32).adapter
    assert len({packed.digest, other.digest, adapter.digest, Adapter(louder).digest}) == 4


def test_formats_without_magnitudes_refuse_it(dora_registry: Registry, tmp_path: Path) -> None:
    with pytest.raises(AdapterRefused, match="no magnitudes"):
        dora_registry.export("d", tmp_path / "d.pth", "minimind")
    with pytest.raises(AdapterRefused, match="merge it into the base"):
        dora_registry.blend(parse_spec("d:0.5+a"), "kept")


def test_deterministic_rows_keep_their_bits_beside_others(
    base: Base, dora_registry: Registry, tiny_base_dir: Path
) -> None:
    mine = load_base(str(tiny_base_dir), device="cpu", dtype="float32")
    if not gemm.available(torch.float32, mine.config.hidden_size):
        pytest.skip("deterministic needs a C compiler")
    service = Service(mine, dora_registry, max_model_len=64, deterministic=True)
    params = SamplingParams(max_tokens=6, temperature=0.0, ignore_eos=True, logprobs=5)
    service.start()
    try:

        def ask(specs: list[str]) -> list[list[float]]:
            generations = [service.generate(IDS, parse_spec(spec), params) for spec in specs]
            return [[t.logprob for p in g for t in p.logprobs] for g in generations]

        alone = [ask([spec])[0] for spec in SPECS]
        assert ask(SPECS) == alone
    finally:
        service.stop()


def test_two_of_them_are_compared_as_they_are_served(base: Base, dora_registry: Registry) -> None:
    adapters = [dora_registry.load(name) for name in ("d", "e")]
    figures, _ = measure(base, (adapters[0].weights, adapters[1].weights), None)
    stacks = [AdapterStack([prepared(adapter, base.weight_of).weights]) for adapter in adapters]
    assert figures["perplexity on general text"] == pytest.approx([perplexity(base, stack) for stack in stacks])
    assert len({*figures["perplexity on general text"], perplexity(base, None)}) == 3


def test_a_copy_in_the_host_s_memory_brings_its_gains(base: Base, dora_registry: Registry) -> None:
    cpu, signature = torch.device("cpu"), dora_registry.get("d").signature
    tiers = AdapterTiers(dora_registry, cpu, torch.float32, 1 << 30, has_host=True, weight_of=base.weight_of)
    got = tiers.fetch("d", signature)
    want = prepared(dora_registry.load("d"), base.weight_of)
    assert got.weights.keys() == want.weights.keys()
    for target, weight in want.weights.items():
        assert weight.gain.abs().max() > 0.05
        assert torch.equal(got.weights[target].gain, weight.gain) and torch.equal(got.weights[target].B, weight.B)


def test_experts_have_gains_of_their_own(moe: Base, random_adapter) -> None:
    plain = random_adapter(moe.shapes, "all-linear", 3, 1)
    generator = torch.Generator().manual_seed(2)
    ids, attention = torch.tensor(IDS), PackedAttention([len(IDS)])
    weights = {}
    for target, w in plain.weights.items():
        norm = moe.weight_of(target).norm(dim=1)
        weights[target] = replace(w, magnitude=norm * (torch.rand(len(norm), generator=generator) + 0.5))
    ready = prepared(Adapter(weights), moe.weight_of)
    lora = LoraBatch.uniform(ready.weights, len(IDS))
    checkpoint = merge_checkpoint(read_pristine(moe), [(Adapter(weights), 1.0)], torch.float32)
    merged = build_model(checkpoint, moe.device, moe.dtype)
    with torch.no_grad():
        got = moe.model(ids, attention.positions, attention, lora)
        want = merged(ids, attention.positions, attention, None)
        without = moe.model(ids, attention.positions, attention, LoraBatch.uniform(plain.weights, len(IDS)))
    assert (want - without).abs().max() > 0.05
    torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-3)
