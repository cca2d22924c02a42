"""Hot-merged adapters compute what the unmerged path and the offline merge compute, and nobody else notices.

The oracle of a merged model is a model built whole from the checkpoint's merged tensors; the two must agree bit for bit.
"""

import dataclasses
from pathlib import Path

import pytest
import torch
from torch import Tensor

from loraserve.base.attention import PackedAttention
from loraserve.base.checkpoint import read_checkpoint
from loraserve.base.fingerprint import compute
from loraserve.base.linear import Joint
from loraserve.base.load import Base, build_model, load_base
from loraserve.base.model import Model
from loraserve.engine.generation import Generation
from loraserve.engine.merge import merge, merge_checkpoint
from loraserve.engine.params import SamplingParams
from loraserve.engine.service import Service
from loraserve.lora.config import LoraConfig
from loraserve.lora.spec import parse_spec
from loraserve.registry import Registry

GREEDY = SamplingParams(max_tokens=20, temperature=0.0, ignore_eos=True)
LINE = [(37 * i) % 500 + 10 for i in range(40)]
ASKED = [
    ([5, 6, 7], "b"), (list(range(10, 60)), "base"), ([70, 80, 90], "a"), (list(range(200, 205)), "b"),
    ([100, 200], "b:0.5"), ([5, 6], "a+b:-0.5"), (list(range(30, 70)), "c"), ([5, 6, 7], "base"),
]  # fmt: skip
"""What is asked at once; `b` and `c` get merged."""


def collect(generation: Generation) -> list[int]:
    return [token_id for piece in generation for token_id in piece.token_ids]


def logits(model: Model, ids: list[int] = LINE) -> Tensor:
    """(T, vocab) of a model alone."""
    attention = PackedAttention([len(ids)])
    with torch.inference_mode():
        return model(torch.tensor(ids), attention.positions, attention).float()


def offline(base: Base, registry: Registry, name: str) -> Model:
    """The oracle: every weight read from the base's files, merged and rounded once to what the base computes in."""
    merged = merge_checkpoint(read_checkpoint(base.path), [(registry.load(name), 1.0)], base.dtype)
    model = build_model(merged, base.device, base.dtype)
    model.pack()
    return model


def tensors_of(model: Model) -> dict[int, Tensor]:
    """Every tensor a model holds, once for each piece of memory."""
    found: dict[int, Tensor] = {}
    for module in model.modules():
        values = [*module._parameters.values(), *module._buffers.values(), *vars(module).values()]
        for tensor in (value for value in values if isinstance(value, Tensor) and value.device.type != "meta"):
            if tensor.numel():
                found[id(tensor) if tensor.is_mkldnn else tensor.untyped_storage().data_ptr()] = tensor
    return found


def own_bytes(model: Model, base: Model) -> int:
    shared = tensors_of(base)
    own = [tensor for key, tensor in tensors_of(model).items() if key not in shared]
    return sum(t.numel() * t.itemsize if t.is_mkldnn else t.untyped_storage().nbytes() for t in own)


def test_merged_base_and_other_adapters_in_one_batch_answer_as_before_any_merge(
    service: Service, base: Base, registry: Registry, tmp_path: Path
) -> None:
    asked = [(prompt, parse_spec(spec)) for prompt, spec in ASKED]
    before = [collect(service.generate(prompt, spec, GREEDY)) for prompt, spec in asked]
    assert len({tuple(tokens) for tokens in before}) == len(asked), "every adapter must change the answer"
    reports = {name: service.merge(name) for name in "bc"}
    steps = service.stats()["steps_total"]
    watched = dataclasses.replace(GREEDY, logprobs=20)
    generations = [service.generate(prompt, spec, watched) for prompt, spec in asked]
    ran_on = [generation._sequence.merged for generation in generations]
    assert ran_on == [reports.get(spec) for _, spec in ASKED]
    pieces = [list(generation) for generation in generations]
    assert service.stats()["steps_total"] - steps < 2 * 20, "the requests must have shared their steps"
    assert [[i for piece in answer for i in piece.token_ids] for answer in pieces] == before
    models = {"base": base.model}
    for name in "bc":  # also what `loraserve merge` writes, whose weights are rounded to the file's float16
        written = merge(base, registry, parse_spec(name), tmp_path / name)
        models[name] = load_base(str(written.path), device="cpu", dtype="float32").model
    for (prompt, spec), answer, tokens in zip(ASKED, pieces, before, strict=True):
        if spec in models:
            exact = logits(models[spec], prompt + tokens[:-1])[len(prompt) - 1 :].log_softmax(dim=-1)
            found = [token for piece in answer for token in piece.logprobs]
            for row, token in zip(exact, found, strict=True):
                assert len(token.top) == 20
                limit = 1e-4 if spec == "base" else 0.02
                assert all(abs(row[other.token_id].item() - other.logprob) < limit for other in token.top)


def test_the_bases_bits_are_the_same_before_during_and_after(base: Base, registry: Registry) -> None:
    # Drafts beside it are more rows of the base's, which in float32 change a row's last bits, and only when it is alone.
    service = Service(base, registry, max_model_len=192, max_num_seqs=16, speculate=0)
    service.start()
    weights = {name: tensor.clone() for name, tensor in base.model.state_dict().items()}
    packed = [module._weight.clone() for module in base.model.modules() if isinstance(module, Joint)]
    watched = dataclasses.replace(GREEDY, logprobs=5)

    def answer() -> list[float]:
        return [token.logprob for piece in service.generate(LINE, (), watched) for token in piece.logprobs]

    answer()  # from now on its prompt is there, and every answer begins with the same token
    before, scores = service.logits(LINE), answer()
    service.merge("b")
    crowd = [service.generate([20 + i], parse_spec("b"), GREEDY) for i in range(5)]
    assert answer() == scores
    assert all(collect(generation) for generation in crowd)
    assert torch.equal(service.logits(LINE), before)
    service.unmerge("b")
    assert torch.equal(service.logits(LINE), before)
    assert answer() == scores
    assert all(torch.equal(tensor, weights[name]) for name, tensor in base.model.state_dict().items())
    found = [module._weight for module in base.model.modules() if isinstance(module, Joint)]
    assert all(torch.equal(a, b) for a, b in zip(found, packed, strict=True))
    assert compute(read_checkpoint(base.path)) == base.fingerprint
    service.stop()


@pytest.mark.parametrize("name", ["a", "b", "c"])
def test_a_merged_model_is_bit_for_bit_the_offline_one(
    service: Service, base: Base, registry: Registry, name: str
) -> None:
    unmerged = service.logits(LINE, parse_spec(name))
    merged = service.merge(name)
    found = service.logits(LINE, parse_spec(name))
    assert (unmerged - service.logits(LINE)).abs().max() > 1
    assert torch.equal(found, logits(offline(base, registry, name)))
    torch.testing.assert_close(found, unmerged, atol=1e-4, rtol=0)
    assert merged.parity.greedy_agreement == 1.0
    assert 0 < merged.parity.max_logit_difference < 1e-4 < merged.parity.max_logit
    assert merged.num_layers == len(registry.load(name).weights)


def test_only_what_the_adapter_touches_is_newly_allocated(service: Service, base: Base) -> None:
    merged = service.merge("a")  # q_proj and down_proj, so that k_proj and v_proj are packed anew, too
    attention, block = base.config.linear_shapes(), "model.layers.0"
    owned = [f"{block}.self_attn.{layer}_proj" for layer in "qkv"] + [f"{block}.mlp.down_proj"]
    expected = base.config.num_hidden_layers * sum(attention[t][0] * attention[t][1] for t in owned) * 4
    assert merged.num_bytes == own_bytes(merged.model, base.model) == service.stats()["merged_bytes"]
    assert expected <= merged.num_bytes <= 1.25 * expected  # kernels fill outputs up to whole vectors
    assert merged.model.model.embed_tokens is base.model.model.embed_tokens
    assert merged.model.head is base.model.head
    mine, theirs = merged.model.model.layers[1], base.model.model.layers[1]
    assert mine.mlp.gate_up is theirs.mlp.gate_up and mine.self_attn.out is theirs.self_attn.out
    assert mine.self_attn.k_proj is not theirs.self_attn.k_proj
    x = torch.randn(3, base.config.hidden_size, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        (q, *others), (unmerged_q, *unmerged) = mine.self_attn.qkv(x, None), theirs.self_attn.qkv(x, None)
    assert torch.equal(torch.cat(others, 1), torch.cat(unmerged, 1))
    assert (q - unmerged_q).abs().max() > 0.1


def test_an_adapter_on_a_tied_head_unties_it_in_its_own_model_alone(service: Service, base: Base) -> None:
    assert base.config.tie_word_embeddings
    assert service.merge("c").untied and not service.merge("b").untied
    model = service.merge("c").model
    assert not model.config.tie_word_embeddings
    assert model.model.embed_tokens is base.model.model.embed_tokens
    x = torch.randn(3, base.config.hidden_size, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        assert (model.head(x, None)[0] - base.model.head(x, None)[0]).abs().max() > 0.1
    assert base.model.lm_head.weight is base.model.model.embed_tokens.weight
    assert own_bytes(model, base.model) == service.merge("c").num_bytes


def test_other_scales_and_blends_do_not_run_on_the_merged_model(service: Service) -> None:
    specs = ["b:0.5", "b:-1", "b:0", "a+b", "base", "a"]
    before = [service.logits(LINE, parse_spec(spec)) for spec in specs]
    merged = service.merge("b")
    assert all(torch.equal(service.logits(LINE, parse_spec(s)), row) for s, row in zip(specs, before, strict=True))
    for spec in ("b", "b:1", "b:0.5+b:0.5"):
        generation = service.generate(LINE, parse_spec(spec), GREEDY)
        assert generation._sequence.merged is merged and not generation._sequence.adapters
        collect(generation)


@pytest.mark.parametrize("targets", [["gate_proj", "up_proj", "down_proj"], ["gate", "k_proj"], "all"])
def test_experts_and_router_of_a_mixture_are_merged(moe: Base, random_adapter, tmp_path: Path, targets) -> None:
    registry = Registry(tmp_path, moe.shapes, moe.fingerprint)
    adapter = random_adapter(moe.shapes, targets, 3, 1)
    config = LoraConfig(r=3, lora_alpha=6, target_modules=sorted(adapter.weights))
    registry.publish("one", adapter, config, {"base_fingerprint": moe.fingerprint})
    service = Service(moe, registry, max_model_len=192)
    service.start()
    try:
        spec = parse_spec("one")
        unmerged, alone = service.logits(LINE, spec), collect(service.generate(LINE, spec, GREEDY))
        merged = service.merge("one")
        found = service.logits(LINE, spec)
        assert (found - service.logits(LINE)).abs().max() > 0.1
        assert torch.equal(found, logits(offline(moe, registry, "one")))
        torch.testing.assert_close(found, unmerged, atol=1e-4, rtol=0)
        assert own_bytes(merged.model, moe.model) == merged.num_bytes
        mine, beside = service.generate(LINE, spec, GREEDY), service.generate(LINE, (), GREEDY)
        assert collect(mine) == alone != collect(beside)
    finally:
        service.stop()


def test_in_bfloat16_packed_weights_are_rounded_once_from_the_files(
    tiny_base_dir: Path, base: Base, registry: Registry
) -> None:
    half = load_base(str(tiny_base_dir), device="cpu", dtype="bfloat16")
    files = read_checkpoint(tiny_base_dir)
    adapter = registry.load("b")
    target = "model.layers.0.mlp.down_proj"
    once = files.tensors[f"{target}.weight"].float() + adapter.weights[target].delta()
    by_way_of_the_base = half.model.model.layers[0].mlp.down_proj.weight.float() + adapter.weights[target].delta()
    assert not torch.equal(once.bfloat16(), by_way_of_the_base.bfloat16())
    service = Service(half, registry, max_model_len=192)
    service.start()
    try:
        plain = service.logits(LINE)
        merged = service.merge("b")
        found = service.logits(LINE, parse_spec("b"))
        assert torch.equal(found, logits(offline(half, registry, "b")))
        assert (found - plain).abs().max() > 1
        assert merged.num_bytes == own_bytes(merged.model, half.model)
        assert merged.parity.dtype == "bfloat16" and merged.parity.greedy_agreement > 0.9
        assert len(collect(service.generate(LINE, parse_spec("b"), GREEDY))) == 20
        service.unmerge("b")
        assert torch.equal(service.logits(LINE), plain)
    finally:
        service.stop()
