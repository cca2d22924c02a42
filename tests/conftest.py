"""What every test may use: upstream's recorded outputs, a tiny random bilingual base, random adapters.

No test reaches the network or leaves anything in the user's caches.
"""

import json
import os
from collections.abc import Callable, Iterator, Sequence
from io import BytesIO
from pathlib import Path

import pytest
import sentencepiece
import torch
from safetensors.torch import save_file

from loraserve.base.config import ModelConfig
from loraserve.base.hf_config import config_to_hf
from loraserve.base.model import Model
from loraserve.lora.adapter import Adapter, LoraWeight, Shapes
from loraserve.lora.config import expand_targets

os.environ["HF_HUB_OFFLINE"] = "1"
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # runs CUDA's kernels on the CPU; Triton reads it when it is imported
torch.set_num_threads(1)

TEXTS = (
    "Hello! How are you today? I am fine, thank you very much.",
    "What is the weather like? It is sunny, and the sky is blue.",
    "Tell me a story about a small robot who liked to count the stars.",
    "你好！今天天气怎么样？今天天气很好，天空是蓝色的。",
    "你是谁？我是一个小小的聊天模型，很高兴认识你。",
    "给我讲一个故事吧。从前有一个喜欢数星星的小机器人。",
)
CHAT_TEMPLATE = (
    "{%- for message in messages %}"
    "{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}"
    "{%- if open_thinking %}{{- '<think>\\n' }}{%- endif %}{%- endif %}"
)

MakeAdapter = Callable[[Shapes, str | Sequence[str], int, int], Adapter]


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Caches of this run alone."""
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(folder))
        yield folder


@pytest.fixture(scope="session")
def conformance() -> Path:
    """Outputs of MiniMind's own code on small random models."""
    folder = os.environ.get("LORASERVE_CONFORMANCE")
    if not folder:
        pytest.skip("LORASERVE_CONFORMANCE does not name the folder with the outputs of MiniMind's own code")
    return Path(folder)


def train_sentencepiece(folder: Path, texts: Sequence[str] = TEXTS, **options: object) -> Path:
    """Train a byte-fallback BPE like the bundled base's and write it as a tokenizer directory."""
    model = BytesIO()
    settings = {
        "model_type": "bpe", "vocab_size": 520, "character_coverage": 1.0, "byte_fallback": True,
        "normalization_rule_name": "identity", "add_dummy_prefix": False, "remove_extra_whitespaces": False,
        "pad_id": 0, "pad_piece": "<|endoftext|>", "bos_id": 1, "bos_piece": "<|im_start|>",
        "eos_id": 2, "eos_piece": "<|im_end|>", "unk_id": 3,
        "minloglevel": 2, "num_threads": 1,
    }  # fmt: skip
    sentencepiece.SentencePieceTrainer.train(sentence_iterator=iter(texts), model_writer=model, **(settings | options))
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.model").write_bytes(model.getvalue())
    names = {"pad_token": "<|endoftext|>", "bos_token": "<|im_start|>", "eos_token": "<|im_end|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(names | {"chat_template": CHAT_TEMPLATE}), "utf-8")
    return folder


def random_weights(config: ModelConfig, seed: int = 0) -> dict[str, torch.Tensor]:
    """Weights under which a model's answers depend on all that it read, without a tied head."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, tensor in Model(config).state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        noise = torch.randn(tensor.shape, generator=generator)
        if tensor.ndim == 1:
            tensors[name] = 1 + 0.1 * noise
        else:
            tensors[name] = noise * (0.25 if "embed" in name else 1.5 * tensor.shape[1] ** -0.5)
    return tensors


@pytest.fixture(scope="session")
def tiny_base_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random base of two layers with a Chinese and English tokenizer, as a Hugging Face directory.

    The tokenizer is trained here and not the bundled base's, so that retraining that one changes no test.
    """
    folder = train_sentencepiece(tmp_path_factory.mktemp("base") / "tiny")
    vocabulary = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    config = ModelConfig(
        vocab_size=vocabulary.get_piece_size(),
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        intermediate_size=96,
        max_position_embeddings=2048,
        qk_norm=True,
    )
    tensors = {name: tensor.half() for name, tensor in random_weights(config).items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config_to_hf(config, "float16")), "utf-8")
    return folder


def make_adapter(shapes: Shapes, targets: str | Sequence[str], r: int, seed: int) -> Adapter:
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for target in expand_targets(targets, shapes):
        out, inp = shapes[target]
        A = torch.randn(r, inp, generator=generator) * inp**-0.5
        B = torch.randn(out, r, generator=generator) * 0.2
        weights[target] = LoraWeight(A, B, 2.0)
    return Adapter(weights, f"random-{seed}")


@pytest.fixture(scope="session")
def random_adapter() -> MakeAdapter:
    """`random_adapter(shapes, targets, r, seed)`: an adapter that visibly changes answers.

    `targets` is what `target_modules` takes, presets included; alpha is 2r.
    """
    return make_adapter
