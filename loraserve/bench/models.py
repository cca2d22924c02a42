"""A random base and random adapters, so that a benchmark needs no download. Shapes are those of minimind-3 (64M).

Its tokenizer makes every engine's work alike and its answers legible to the load generator: a token of an answer is
always two printable characters, for the special tokens and the single bytes have zero embeddings and so never the
largest logit.
"""

import itertools
import json
import math
import string
import tempfile
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from loraserve.base.checkpoint import Checkpoint, expected_tensors
from loraserve.base.config import ModelConfig
from loraserve.base.export import write_hf
from loraserve.base.fingerprint import fingerprint
from loraserve.bench.contestant import VOCAB
from loraserve.lora.adapter import Adapter, LoraWeight
from loraserve.lora.config import LoraConfig, expand_targets
from loraserve.registry import Registry

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "<|im_start|>assistant\n"
)


def minimind3_config() -> ModelConfig:
    """minimind-3, dense: 63.9M parameters."""
    return ModelConfig(
        vocab_size=VOCAB.stop,
        hidden_size=768,
        num_hidden_layers=8,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=96,
        intermediate_size=math.ceil(768 * math.pi / 64) * 64,
        qk_norm=True,
    )


def make_base(folder: Path, config: ModelConfig, seed: int = 1234) -> Checkpoint:
    """Write a random base of `config`, whose vocabulary must be the benchmark's, as a Hugging Face directory."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {
        name: torch.ones(shape) if len(shape) == 1 else torch.randn(shape, generator=generator) * 0.02
        for name, shape in expected_tensors(config).items()
    }
    tensors["model.embed_tokens.weight"][: VOCAB.start] = 0.0
    with tempfile.TemporaryDirectory() as tokenizer:
        _write_tokenizer(Path(tokenizer))
        write_hf(Checkpoint(config, tensors, folder, "hf"), folder, Path(tokenizer))
    return Checkpoint(config, tensors, folder, "hf")


def make_adapters(base: Checkpoint, folder: Path, names: list[str], r: int) -> None:
    """Publish random adapters for every linear layer in `folder`; the same name and rank is the same adapter."""
    shapes, identity = base.config.linear_shapes(), fingerprint(base)
    registry = Registry(folder, shapes, identity)
    targets = expand_targets("all-linear", shapes)
    lora = LoraConfig(r=r, lora_alpha=2 * r, target_modules=sorted({t.rsplit(".", 1)[1] for t in targets}))
    for name in names:
        generator = torch.Generator().manual_seed(int.from_bytes(name.encode()) % 2**63)
        weights = {}
        for target in targets:
            out, inp = shapes[target]
            A, B = torch.randn(r, inp, generator=generator), torch.randn(out, r, generator=generator)
            weights[target] = LoraWeight(A * 0.02, B * 0.02, 2.0)
        registry.publish(name, Adapter(weights, name), lora, {"base_fingerprint": identity})


def _write_tokenizer(folder: Path) -> None:
    """Byte-level BPE as MiniMind's is: special tokens, all bytes, then pairs of letters."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    letters = string.ascii_letters + string.digits + string.punctuation
    merges = [(a, b) for a, b in itertools.islice(itertools.product(letters, letters), len(VOCAB))]
    tokens = [*SPECIAL, *alphabet, *map("".join, merges)]
    assert len(tokens) == VOCAB.stop and tokens[VOCAB.start] == "aa"
    tokenizer = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(SPECIAL)
    tokenizer.save(str(folder / "tokenizer.json"))
    pad, bos, eos = SPECIAL
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "chat_template": TEMPLATE, "model_max_length": 32768}
    settings |= {"pad_token": pad, "bos_token": bos, "eos_token": eos, "clean_up_tokenization_spaces": False}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings), "utf-8")
