"""Train the bundled base from the texts beside this file: tokenizer, then embeddings, then the model.

    python examples/base/train.py --out DIR
    python examples/base/train.py --out DIR --start DIR --tokens 600000 --lr 0.004     # later, for texts that were added

A MiniMind-3 of 6.7M parameters, in bf16 on a CPU that has it (else float32). The text is far too little to learn from it
alone what words mean, so the embeddings come first: summed over a question they must tell which answer it wants, whatever
words are missing. That takes a minute or two and lets the model answer phrasings it has not met. Then the model is trained
on packed dialogues without padding, through the same forward pass that serves: hidden matrices with Muon (momentum
orthogonalised, K. Jordan 2024), embeddings and norms with AdamW, the learning rate falling linearly over the last 60% of
the steps. Words are missing from most questions until the end is near; the last questions are whole. How workers take turns
changes sums, so a rerun gives another base of the same kind.
"""

import argparse
import io
import json
import math
import random
import tempfile
import time
from pathlib import Path

import corpus as texts
import sentencepiece
import torch
import torch.distributed as distributed
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from samples import Sample, batches, encode, encode_question

from loraserve.base.attention import PackedAttention
from loraserve.base.config import ModelConfig
from loraserve.base.model import Model

VOCAB = 6400
BROKEN_UNTIL = 0.85
"""Of the steps; from then on questions are whole and split into tokens as they will be when served."""
ROLES = ["system\n", "user\n", "assistant\n"]
"""One token each, for every message begins with one."""
TEMPLATE = (
    "{%- for message in messages %}"
    "{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"
)
SAMPLES = ["hello", "Why is the sky blue?", "any tips to sleep better", "Who are you?", "I lost my job today.",
           "你好", "你是谁？", "为什么会下雨？", "最近压力很大，怎么办", "讲个笑话"]  # fmt: skip


def model_config() -> ModelConfig:
    hidden = 256
    return ModelConfig(
        vocab_size=VOCAB,
        hidden_size=hidden,
        num_hidden_layers=6,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=32,
        intermediate_size=math.ceil(hidden * math.pi / 64) * 64,
        max_position_embeddings=2048,
        qk_norm=True,
        norm_in_float32=True,
    )


def train_tokenizer(corpus: texts.Corpus, folder: Path) -> sentencepiece.SentencePieceProcessor:
    """Byte-fallback BPE over everything the corpus can say."""
    rng = random.Random(0)
    lines = [message["content"] for _ in range(6) for dialogue in texts.one_pass(corpus, rng) for message in dialogue]
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines), model_writer=model, model_type="bpe", vocab_size=VOCAB, character_coverage=1.0,
        byte_fallback=True, split_digits=True, normalization_rule_name="identity", add_dummy_prefix=False,
        remove_extra_whitespaces=False, user_defined_symbols=["\n", *ROLES], minloglevel=2, num_threads=2,
        pad_id=0, pad_piece="<|endoftext|>", bos_id=1, bos_piece="<|im_start|>", eos_id=2, eos_piece="<|im_end|>", unk_id=3,
    )  # fmt: skip
    (folder / "tokenizer.model").write_bytes(model.getvalue())
    return sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())


def train_embeddings(
    corpus: texts.Corpus, tokenizer: sentencepiece.SentencePieceProcessor, passes: int = 15
) -> torch.Tensor:
    """Embeddings (vocab, hidden) whose mean over a question says what is meant by it."""
    rng = random.Random(2)
    bag = torch.nn.EmbeddingBag(VOCAB, model_config().hidden_size, mode="mean")
    torch.nn.init.normal_(bag.weight, std=0.05)
    head = torch.nn.Linear(model_config().hidden_size, corpus.num_meanings)
    optimizer = torch.optim.AdamW([*bag.parameters(), *head.parameters()], lr=5e-3, weight_decay=0.02)
    for done in range(passes):
        optimizer.param_groups[0]["lr"] = 5e-3 * (1 - done / passes)
        asked = [e for _ in range(9) for e in texts.exchanges(corpus, rng)]
        right = 0
        for batch in (asked[i : i + 256] for i in range(0, len(asked), 256)):
            questions = [encode_question(e.question, tokenizer, rng) for e in batch]
            starts = torch.tensor([0, *map(len, questions)]).cumsum(0)[:-1]
            logits = head(4 * bag(torch.tensor([i for ids in questions for i in ids]), starts))
            meanings = torch.tensor([e.meaning for e in batch])
            optimizer.zero_grad()
            F.cross_entropy(logits, meanings, label_smoothing=0.1).backward()
            optimizer.step()
            right += int((logits.argmax(1) == meanings).sum())
        print(f"embeddings {done + 1}/{passes}: {right / len(asked):.0%} of the questions understood", flush=True)
    weight = bag.weight.detach()
    weight[:8] *= 0.2  # markers: no question needs them
    return weight * (0.04 / weight.std())


def save(model: Model, folder: Path) -> None:
    """Write the Hugging Face directory that `--base bundled` loads, weights in float16."""
    config = model.config
    tensors = {n: t.detach().half().contiguous() for n, t in model.state_dict().items() if n != "lm_head.weight"}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    facts = {
        "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size, "num_hidden_layers": config.num_hidden_layers,
        "num_attention_heads": config.num_attention_heads, "num_key_value_heads": config.num_key_value_heads,
        "head_dim": config.head_dim, "intermediate_size": config.intermediate_size, "rms_norm_eps": config.rms_norm_eps,
        "rope_theta": config.rope_theta, "max_position_embeddings": config.max_position_embeddings,
        "tie_word_embeddings": True, "hidden_act": "silu", "attention_bias": False, "use_sliding_window": False,
        "torch_dtype": "float16", "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(facts, indent=2) + "\n", "utf-8")
    tokens = {
        "tokenizer_class": "LlamaTokenizer", "pad_token": "<|endoftext|>", "bos_token": "<|im_start|>",
        "eos_token": "<|im_end|>", "add_bos_token": False, "add_eos_token": False, "legacy": False,
        "model_max_length": config.max_position_embeddings, "chat_template": TEMPLATE,
    }  # fmt: skip
    (folder / "tokenizer_config.json").write_text(json.dumps(tokens, indent=2) + "\n", "utf-8")


@torch.no_grad()
def answer(model: Model, tokenizer: sentencepiece.SentencePieceProcessor, question: str) -> str:
    ids, _ = encode([{"role": "user", "content": question}], tokenizer)
    ids = [*ids, 1, *tokenizer.encode("assistant\n")]
    start = len(ids)
    while len(ids) < start + 80:
        attention = PackedAttention([len(ids)])
        logits = model(torch.tensor(ids), attention.positions, attention, rows=torch.tensor([len(ids) - 1]))
        token = int(logits.argmax())
        if token == 2:
            break
        ids.append(token)
    return tokenizer.decode(ids[start:])


class Team:
    """Workers that train one model together, a thread each: small matrices gain little from threads within one of them.

    Gradients are averaged; each worker orthogonalises its share of the matrices and hands the result to the others.
    """

    def __init__(self, rank: int, size: int, model: Model, lr: float) -> None:
        self.rank, self.size = rank, size
        hidden = [p for n, p in model.named_parameters() if p.ndim == 2 and "embed" not in n]
        others = [p for n, p in model.named_parameters() if p.ndim != 2 or "embed" in n]
        self.parameters = hidden + others
        self.shares = [hidden[i::size] for i in range(size)]
        self.optimizers = [
            torch.optim.Muon(self.shares[rank], lr=lr, weight_decay=0.05, momentum=0.95),
            torch.optim.AdamW(others, lr=lr / 5, betas=(0.9, 0.95), weight_decay=0.0),
        ]
        self.rates = (lr, lr / 5)

    def step(self, scale: float) -> None:
        gradients = [p.grad for p in self.parameters]
        if self.size > 1:
            flat = torch._utils._flatten_dense_tensors(gradients)
            distributed.all_reduce(flat)
            flat /= self.size
            for gradient, mean in zip(gradients, torch._utils._unflatten_dense_tensors(flat, gradients), strict=True):
                gradient.copy_(mean)
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        for optimizer, rate in zip(self.optimizers, self.rates, strict=True):
            optimizer.param_groups[0]["lr"] = rate * scale
            optimizer.step()
        for parameter in self.parameters:
            parameter.grad = None
        if self.size > 1:
            with torch.no_grad():
                for owner, share in enumerate(self.shares):
                    flat = torch._utils._flatten_dense_tensors([p.data for p in share])
                    distributed.broadcast(flat, owner)
                    for parameter, new in zip(share, torch._utils._unflatten_dense_tensors(flat, share), strict=True):
                        parameter.copy_(new)


def work(rank: int, args: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    if args.workers > 1:
        store = distributed.FileStore(args.meeting, args.workers)
        distributed.init_process_group("gloo", store=store, rank=rank, world_size=args.workers)
    corpus, rng = texts.read(), random.Random(100 + rank)
    tokenizer = sentencepiece.SentencePieceProcessor(model_file=str(args.out / "tokenizer.model"))
    model = Model(model_config())
    for name, parameter in model.named_parameters():
        if parameter.ndim == 2:
            torch.nn.init.normal_(parameter, std=0.02 if "embed" in name else parameter.shape[1] ** -0.5 / 2)
    if args.start:
        tensors = {name: tensor.float() for name, tensor in load_file(args.start / "model.safetensors").items()}
        model.load_state_dict(tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"]})
    else:
        model.model.embed_tokens.weight.data.copy_(args.embeddings)
    team = Team(rank, args.workers, model, args.lr)
    size = args.tokens_per_step // args.workers
    broken = batches(texts.stream(corpus, seed=1 + rank, broken=True), tokenizer, rng, size, broken=True)
    whole = batches(texts.stream(corpus, seed=11 + rank, broken=False), tokenizer, rng, size, broken=False)
    started = shown = time.monotonic()
    steps, average, seen = args.tokens // args.tokens_per_step, 0.0, 0
    for step in range(steps):
        done = step / steps
        batch = next(broken if done < BROKEN_UNTIL and not args.start else whole)
        loss = loss_of(model, batch)
        loss.backward()
        team.step(scale=min(1.0, (step + 1) / 50) * min(1.0, (1 - done) / 0.6))
        seen += sum(len(ids) for ids, _ in batch) * args.workers
        average = loss.item() if step == 0 else 0.97 * average + 0.03 * loss.item()
        if rank == 0 and time.monotonic() - shown > 60:
            shown = time.monotonic()
            print(f"step {step} loss {average:.4f} {seen / (shown - started):.0f} tokens/s {done:.0%}", flush=True)
            if int((shown - started) / 60) % 10 == 0:
                show(model, tokenizer)
                save(model, args.out)
    if rank == 0:
        save(model, args.out)
        show(model, tokenizer)
        print(f"{step} steps, {seen} tokens, {(time.monotonic() - started) / 60:.1f} minutes, loss {average:.4f}")
    if args.workers > 1:
        distributed.destroy_process_group()


def loss_of(model: Model, batch: list[Sample]) -> torch.Tensor:
    """Weighted cross-entropy of packed dialogues, () float32."""
    ids = torch.tensor([i for sample, _ in batch for i in sample])
    targets = torch.tensor([i for sample, _ in batch for i in [*sample[1:], 0]])
    weights = torch.tensor([w for _, sample in batch for w in [*sample[1:], 0.0]])
    rows = weights.nonzero().squeeze(1)
    attention = PackedAttention([len(sample) for sample, _ in batch])
    with torch.autocast("cpu", torch.bfloat16, enabled=torch.ops.mkldnn._is_mkldnn_bf16_supported()):
        logits = model(ids, attention.positions, attention, rows=rows)
    losses = F.cross_entropy(logits.float(), targets[rows], reduction="none")
    return (losses * weights[rows]).sum() / weights.sum()


def show(model: Model, tokenizer: sentencepiece.SentencePieceProcessor) -> None:
    for question in SAMPLES:
        print("   ", question, "->", answer(model, tokenizer, question), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--start", type=Path, help="a trained base to go on from, on whole questions only")
    parser.add_argument("--tokens", type=int, default=11_000_000, help="to train on, padding never counts")
    parser.add_argument("--tokens-per-step", type=int, default=3072)
    parser.add_argument("--lr", type=float, default=0.02, help="of Muon; AdamW's is a fifth of it")
    parser.add_argument("--workers", type=int, default=2, help="processes that share each step, one core each")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    corpus = texts.read()
    print(f"{len(corpus.intents)} intents, {len(corpus.dialogues)} dialogues, {len(corpus.lexicon)} words", flush=True)
    if args.start:
        (args.out / "tokenizer.model").write_bytes((args.start / "tokenizer.model").read_bytes())
    else:
        args.embeddings = train_embeddings(corpus, train_tokenizer(corpus, args.out))
    print(f"{model_config().num_parameters / 1e6:.2f}M parameters", flush=True)
    if args.workers == 1:
        work(0, args)
        return
    with tempfile.TemporaryDirectory() as folder:
        args.meeting = f"{folder}/store"
        torch.multiprocessing.spawn(work, (args,), nprocs=args.workers)


if __name__ == "__main__":
    main()
