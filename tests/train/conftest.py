"""A tiny random base with a tokenizer of its own, and dialogue files to train on it."""

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from loraserve.base.config import ModelConfig
from loraserve.base.load import Base, load_base
from loraserve.base.model import Model
from loraserve.train.data import Encoder
from loraserve.train.dataset import Dataset
from loraserve.train.rows import DataFile
from loraserve.train.tokens import tokenize

CHATML = (
    "{%- for message in messages %}"
    "{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"
)
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
PAIRS = [
    ("who are you", "I am Ada, a small robot."),
    ("hello", "Hello! Nice to see you."),
    ("你是谁", "我是阿达，一个小机器人。"),
    ("what is 1+1", "Two, I believe."),
    ("tell me a story", "Once there was a robot who liked to count the stars, one by one, every night."),
    ("bye", "See you soon!"),
    ("你好", "你好，很高兴见到你！"),
]


def write_tokenizer(folder: Path) -> int:
    """Train a byte-level BPE on the dialogues; returns its number of tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([text for pair in PAIRS for text in pair], trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    names = dict(zip(("pad_token", "bos_token", "eos_token"), SPECIAL, strict=True))
    (folder / "tokenizer_config.json").write_text(json.dumps(names | {"chat_template": CHATML}), "utf-8")
    return tokenizer.get_vocab_size()


def write_base(folder: Path, *, num_experts: int = 0, context: int = 256, hidden: int = 32, width: int = 48) -> Path:
    """Write a random Qwen3 or Qwen3-MoE directory of three layers."""
    folder.mkdir()
    facts = {
        "model_type": "qwen3_moe" if num_experts else "qwen3",
        "vocab_size": write_tokenizer(folder),
        "hidden_size": hidden,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "intermediate_size": width,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1e4,
        "max_position_embeddings": context,
        "tie_word_embeddings": True,
        "hidden_act": "silu",
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    if num_experts:
        facts |= {"num_experts": num_experts, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
        facts |= {"norm_topk_prob": True}
    config = ModelConfig(
        **{key: value for key, value in facts.items() if key in ModelConfig.__dataclass_fields__}, qk_norm=True
    )
    (folder / "config.json").write_text(json.dumps(facts), "utf-8")
    model = Model(config)
    generator = torch.Generator().manual_seed(0)
    tensors = {
        name: torch.randn(tensor.shape, generator=generator) * 0.2 if tensor.ndim == 2 else torch.ones(tensor.shape)
        for name, tensor in model.state_dict().items()
        if name != "lm_head.weight"
    }
    save_file(tensors, folder / "model.safetensors")
    return folder


def dataset_of(path: Path, encoder: Encoder, **settings) -> Dataset:
    """The dataset of a file without bad rows; its tokens are beside the file."""
    data = DataFile(path)
    tokens = tokenize(data, encoder, path.with_suffix(".run"), "stop", print)
    return Dataset(data, tokens, encoder, **{"seed": 0} | settings)


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    """Models as small as these run fastest on one."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def base_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_base(tmp_path_factory.mktemp("bases") / "tiny")


@pytest.fixture(scope="session")
def base(base_dir: Path) -> Base:
    return load_base(str(base_dir), device="cpu", dtype="float32")


@pytest.fixture(scope="session")
def moe_base(tmp_path_factory: pytest.TempPathFactory) -> Base:
    folder = write_base(tmp_path_factory.mktemp("bases") / "tiny-moe", num_experts=4)
    return load_base(str(folder), device="cpu", dtype="float32")


@pytest.fixture(scope="session")
def conformance() -> Path:
    """Outputs of MiniMind's own code; without them these tests skip."""
    folder = os.environ.get("LORASERVE_CONFORMANCE")
    if not folder:
        pytest.skip("LORASERVE_CONFORMANCE is not set")
    return Path(folder)


@pytest.fixture(scope="session")
def write_rows() -> Callable[[Path, list], Path]:
    """Writes JSON lines; returns the path."""

    def write(path: Path, rows: list) -> Path:
        path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), "utf-8")
        return path

    return write


@pytest.fixture
def dialogue_file(tmp_path: Path, write_rows: Callable[[Path, list], Path]) -> Path:
    """Fourteen dialogues of different lengths."""
    rows = [
        {"conversations": [{"role": "user", "content": q + mark}, {"role": "assistant", "content": a}]}
        for mark in ("", "?")
        for q, a in PAIRS
    ]
    return write_rows(tmp_path / "robot.jsonl", rows)
