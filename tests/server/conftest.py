"""A base whose every answer is known in advance, run by the real engine.

The model is a real one with one layer that adds nothing and a head that is a bigram table: after token i comes
`NEXT[i]`. So a chat answer, which starts after the template's last line break, follows CHAINS["base"], and an adapter
on `lm_head` that redirects the line break to another chain visibly changes it, in proportion to its scale.
"""

import itertools
import json
import os
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
import torch
from flask import Flask
from flask.testing import FlaskClient
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from loraserve.base.load import Base, load_base
from loraserve.engine.service import Service
from loraserve.registry import Registry
from loraserve.server import Server, create_app

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
END = "<|im_end|>"
CHAINS = {
    "base": ["Hello", " there", ", base", " speaking.", END],
    "pirate": ["Arrr", " matey", ", what", " be ye", " after?", END],
    "poet": ["明月", "几时有", ",把酒", "问青天", END],
    "caller": [
        "<tool_call>", '\n{"name": "get_weather",', ' "arguments": {"city":', ' "Paris"}}', "\n</tool_call>", END,
    ],
    "thinker": ["<think>", "\nhmm,", " let me see", "\n</think>", "\n\nFine.", END],
    "forever": ["la-", "la~"],
    "dice": ["roll:"],
}  # fmt: skip
FACES = [" one;", " two;", " three;", " four;", " five;", " six;"]
LOOPS = {"la~": ["la-"], "roll:": FACES, **{face: ["roll:"] for face in FACES}}
REASONED = "because"
TEMPLATE = (
    "{% if tools %}<|im_start|>system\n{% for tool in tools %}{{ tool | tojson }}\n{% endfor %}<|im_end|>\n{% endif %}"
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "<|im_start|>assistant\n{% if open_thinking %}<think>\n" + REASONED + "{% endif %}"
)


def build_tokenizer() -> Tokenizer:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = dict.fromkeys(word for chain in CHAINS.values() for word in chain if word != END)
    vocab = {token: i for i, token in enumerate([*SPECIAL, *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(SPECIAL)
    tokenizer.add_tokens([AddedToken(word, normalized=False) for word in [*words, *FACES, REASONED]])
    return tokenizer


def write_base(folder: Path) -> Path:
    """Write the base as a Hugging Face directory."""
    folder.mkdir()
    tokenizer = build_tokenizer()
    size, width = tokenizer.get_vocab_size(), 8
    head = torch.zeros(size, size)
    follows: dict[str, list[str]] = {REASONED: ["\n</think>"], "\n": [CHAINS["base"][0]], **LOOPS}
    for chain in CHAINS.values():
        for word, successor in itertools.pairwise(chain):
            follows[word] = [successor]
    for word, successors in follows.items():
        for successor in successors:
            head[tokenizer.token_to_id(successor), tokenizer.encode(word).ids[0]] = 1.0
    layer = "model.layers.0"
    tensors = {
        "model.embed_tokens.weight": torch.eye(size),
        "model.norm.weight": torch.ones(size),
        "lm_head.weight": head,
        f"{layer}.input_layernorm.weight": torch.ones(size),
        f"{layer}.post_attention_layernorm.weight": torch.ones(size),
        f"{layer}.self_attn.q_proj.weight": torch.zeros(width, size),
        f"{layer}.self_attn.k_proj.weight": torch.zeros(width, size),
        f"{layer}.self_attn.v_proj.weight": torch.zeros(width, size),
        f"{layer}.self_attn.o_proj.weight": torch.zeros(size, width),
        f"{layer}.mlp.gate_proj.weight": torch.zeros(width, size),
        f"{layer}.mlp.up_proj.weight": torch.zeros(width, size),
        f"{layer}.mlp.down_proj.weight": torch.zeros(size, width),
    }
    save_file(tensors, folder / "model.safetensors")
    config = {
        "model_type": "llama", "vocab_size": size, "hidden_size": size, "num_hidden_layers": 1,
        "num_attention_heads": 1, "num_key_value_heads": 1, "head_dim": width, "intermediate_size": width,
        "rms_norm_eps": 1e-6, "rope_theta": 10000.0, "max_position_embeddings": 262144, "tie_word_embeddings": False,
        "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"chat_template": TEMPLATE, "bos_token": SPECIAL[1], "eos_token": SPECIAL[2], "pad_token": SPECIAL[0]}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


def write_adapter(folder: Path, base: Base, start: str, *, r: int = 1, **spoil: torch.Tensor) -> Path:
    """Write a PEFT directory whose adapter makes answers begin with `start`.

    At scale s it adds 2s to what the base has at 1, so it wins from s > 0.5 on. `spoil` replaces tensors by name.
    """
    folder.mkdir(parents=True)
    size = base.config.vocab_size
    line_break = base.tokenizer.encode("\n")[0]
    A, B = torch.zeros(r, size), torch.zeros(size, r)
    A[:, line_break] = 1.0
    B[base.tokenizer.encode(start)[0], :] = 2.0 / r
    prefix = "base_model.model"
    tensors = {
        f"{prefix}.lm_head.lora_A.weight": A,
        f"{prefix}.lm_head.lora_B.weight": B,
        f"{prefix}.model.layers.0.self_attn.k_proj.lora_A.weight": torch.full((r, size), 0.01),
        f"{prefix}.model.layers.0.self_attn.k_proj.lora_B.weight": torch.full((8, r), 0.01),
    }
    save_file({**tensors, **spoil}, folder / "adapter_model.safetensors")
    config = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "r": r, "lora_alpha": r, "lora_dropout": 0.0, "bias": "none",
        "target_modules": ["lm_head", "k_proj"], "base_model_name_or_path": base.name, "inference_mode": True,
    }  # fmt: skip
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def text_of(chain: str) -> str:
    return "".join(CHAINS[chain][:-1])


class Live:
    """An app served by waitress on loopback, as `loraserve serve` does."""

    def __init__(self, app: Flask) -> None:
        self.app = app
        self.server = Server(app, "127.0.0.1", 0)
        self.url = self.server.url
        self.client = openai.OpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0)
        self._thread = threading.Thread(target=self.server.run)
        self._thread.start()

    def close(self) -> None:
        self.client.close()
        self.server.close()
        self._thread.join()


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Base:
    torch.set_num_threads(1)
    return load_base(str(write_base(tmp_path_factory.mktemp("base") / "tiny")), device="cpu", dtype="float32")


@pytest.fixture(scope="session")
def make_service(base: Base, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., Service]]:
    """Builds running engines over a registry of their own with all adapters of CHAINS."""
    services = []

    def make(**limits: Any) -> Service:
        root = tmp_path_factory.mktemp("adapters")
        for i, (name, chain) in enumerate(CHAINS.items()):
            if name != "base":
                write_adapter(root / name, base, chain[0], r=1 + i % 3)
        limits = {
            "max_model_len": 65536,
            "max_num_seqs": 4,
            "max_queue": 8,
            "seed": 0,
            "prefix_memory": 32 << 20,
            **limits,
        }
        service = Service(base, Registry(root, base.shapes, base.fingerprint), **limits)
        service.start()
        services.append(service)
        return service

    yield make
    for service in services:
        service.stop()


@pytest.fixture(scope="session")
def service(make_service: Callable[..., Service]) -> Service:
    return make_service()


@pytest.fixture
def app(service: Service) -> Flask:
    return create_app(service)


@pytest.fixture
def client(app: Flask) -> FlaskClient:
    return app.test_client()


@pytest.fixture
def live(app: Flask) -> Iterator[Live]:
    server = Live(app)
    yield server
    server.close()


@pytest.fixture(scope="module")
def training_environment() -> Iterator[None]:
    """Of the processes that train."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join(filter(None, sys.path)))
        patch.setenv("OMP_NUM_THREADS", "1")
        yield
