#!/usr/bin/env python3
"""Train the demo checkpoint: a 1.9 M parameter Llama that writes text in the manner of Python's standard library.

    python examples/demo/train.py --out DIR [--minutes M] [--device auto|cuda|cpu]

The text is the standard library of the interpreter that runs this script, so nothing is fetched. Needs torch,
transformers and tokenizers; the compiler itself needs none of this.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import sysconfig
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor, nn
from torch.nn import functional
from transformers import AutoModelForCausalLM, GenerationConfig, LlamaConfig, LlamaForCausalLM
from transformers.utils import logging as transformers_logging

VOCAB = 2048
CONTEXT = 512
BOS, EOS = "<|bos|>", "<|eos|>"
MAX_CHECKPOINT_BYTES = 4_000_000
MAX_CORPUS_BYTES = 40_000_000
MIN_CORPUS_BYTES = 1_000_000
HELD_OUT_SHARE = 0.01
PROMPTS = ("def read_file(path):\n", "import os\n")

# Tests, installed packages and build settings of one machine are not library source; code page tables and the
# text of the help system are data, and data is where a small greedy model learns to repeat itself.
SKIPPED_DIRECTORIES = {
    "test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__", "encodings", "pydoc_data",
}  # fmt: skip
SKIPPED_PREFIXES = ("_sysconfigdata", "sitecustomize", "usercustomize", "config-")

# A newline is a token of its own and an indentation is one token, so that a prompt may end after either
# and still be cut as the training text was.
WORDS = r"\n| {2,}| ?[^\W\d]+|\d| ?[^\s\w]+|\s"


@dataclass(frozen=True)
class Recipe:
    """How one kind of device is used; ``batch`` is in sequences of CONTEXT tokens."""

    batch: int
    learning_rate: float = 3e-3
    final_share: float = 0.02
    warmup_share: float = 0.03
    weight_decay: float = 0.1


RECIPES = {"cuda": Recipe(batch=128), "cpu": Recipe(batch=4)}


def say(message: str) -> None:
    print(message, flush=True)


def is_library_source(relative: Path) -> bool:
    """Tell whether a path below the standard library's directory belongs to the training text."""
    skipped = any(part in SKIPPED_DIRECTORIES or part.startswith(SKIPPED_PREFIXES) for part in relative.parts)
    return not skipped


def read_corpus() -> list[str]:
    """Return the standard library's sources, one string a file, in order of path."""
    root = Path(sysconfig.get_path("stdlib"))
    relatives = sorted((path.relative_to(root) for path in root.rglob("*.py")), key=lambda path: path.as_posix())
    documents: list[str] = []
    total = 0
    for relative in filter(is_library_source, relatives):
        try:
            text = (root / relative).read_text(encoding="utf-8")
        except (UnicodeDecodeError, OSError):
            continue
        size = len(text.encode())
        if not text.strip() or BOS in text or EOS in text or total + size > MAX_CORPUS_BYTES:
            continue
        total += size
        documents.append(text)
    if total < MIN_CORPUS_BYTES:
        raise SystemExit(f"train: {root} holds only {total} bytes of Python source; {MIN_CORPUS_BYTES} are needed")
    say(f"corpus: {len(documents)} files, {total / 1e6:.1f} MB from Python's standard library")
    return documents


def hold_out(documents: list[str], seed: int) -> tuple[list[str], list[str]]:
    """Return the documents to train on and those kept back for validation: whole files, HELD_OUT_SHARE of the text."""
    shuffled = random.Random(seed).sample(documents, len(documents))
    wanted = HELD_OUT_SHARE * sum(map(len, documents))
    size, count = 0, 0
    while size < wanted:
        size += len(shuffled[count])
        count += 1
    return shuffled[count:], shuffled[:count]


def train_tokenizer(documents: list[str]) -> Tokenizer:
    """Return a byte-level BPE tokenizer of VOCAB entries that puts BOS before what it encodes."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(WORDS), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB,
        special_tokens=[BOS, EOS],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(documents, trainer)
    if tokenizer.get_vocab_size() != VOCAB:
        raise SystemExit(f"train: the tokenizer has {tokenizer.get_vocab_size()} entries instead of {VOCAB}")
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", special_tokens=[(BOS, tokenizer.token_to_id(BOS))]
    )
    return tokenizer


def encode_stream(tokenizer: Tokenizer, documents: list[str]) -> Tensor:
    """Return all documents as one int64 stream [tokens], each one between BOS and EOS."""
    bos, eos = tokenizer.token_to_id(BOS), tokenizer.token_to_id(EOS)
    stream: list[int] = []
    for encoding in tokenizer.encode_batch(documents, add_special_tokens=False):
        stream.append(bos)
        stream.extend(encoding.ids)
        stream.append(eos)
    return torch.tensor(stream, dtype=torch.int64)


def window_starts(tokenizer: Tokenizer, stream: Tensor) -> tuple[Tensor, Tensor]:
    """Return the positions in ``stream`` of every line's first token, and those of top-level lines alone.

    Windows begin at lines because prompts do: the model then meets BOS before ``def`` or ``import`` in training.
    """
    texts = [tokenizer.decode([token], skip_special_tokens=True) for token in range(VOCAB)]
    ends_line = torch.tensor([text.endswith("\n") for text in texts])
    blank = torch.tensor([text.endswith("\n") or not text for text in texts])
    indented = torch.tensor([text[:1].isspace() for text in texts])
    follows_newline = torch.zeros_like(stream, dtype=torch.bool)
    follows_newline[1:] = ends_line[stream[:-1]]
    fits = torch.arange(len(stream)) + CONTEXT <= len(stream)
    lines = follows_newline & ~blank[stream] & fits
    top_level = lines & ~indented[stream]
    return lines.nonzero().squeeze(1), top_level.nonzero().squeeze(1)


class Windows:
    """Random training windows, cut from a token stream that stays on the device."""

    def __init__(self, tokenizer: Tokenizer, stream: Tensor, device: torch.device, seed: int) -> None:
        lines, top_level = window_starts(tokenizer, stream)
        self.lines, self.top_level = lines.to(device), top_level.to(device)
        self.stream = stream.to(device)
        self.offsets = torch.arange(CONTEXT, device=device)
        self.bos: int = tokenizer.token_to_id(BOS)
        self.generator = torch.Generator(device=device).manual_seed(seed)

    def pick(self, positions: Tensor, count: int) -> Tensor:
        """Return ``count`` of ``positions``, drawn with replacement."""
        drawn = torch.randint(len(positions), (count,), generator=self.generator, device=positions.device)
        return positions[drawn]

    def draw(self, batch: int) -> tuple[Tensor, Tensor]:
        """Return inputs and labels, int64 [batch, CONTEXT]; half of the windows begin at a top-level line."""
        top_level = batch // 2
        starts = torch.cat([self.pick(self.top_level, top_level), self.pick(self.lines, batch - top_level)])
        return shift(self.stream[starts[:, None] + self.offsets], self.bos)


def shift(labels: Tensor, bos: int) -> tuple[Tensor, Tensor]:
    """Return the inputs that predict ``labels`` [batch, tokens], which are BOS and all but the last, and the labels."""
    return torch.cat([torch.full_like(labels[:, :1], bos), labels[:, :-1]], dim=1), labels


def make_model(tokenizer: Tokenizer) -> LlamaForCausalLM:
    """Return the untrained model: 6 layers of 192, 3 query heads and 1 key-value head of 64, tied embeddings."""
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=192,
        intermediate_size=256,
        num_hidden_layers=6,
        num_attention_heads=3,
        num_key_value_heads=1,
        head_dim=64,
        max_position_embeddings=CONTEXT,
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.token_to_id(BOS),
        eos_token_id=tokenizer.token_to_id(EOS),
        attn_implementation="sdpa",
    )
    return LlamaForCausalLM(config)


def loss_of(model: nn.Module, inputs: Tensor, labels: Tensor) -> Tensor:
    """Return the mean cross entropy in nats a token; matrix products run in BF16 on a GPU."""
    with torch.autocast(inputs.device.type, dtype=torch.bfloat16, enabled=inputs.device.type == "cuda"):
        logits = model(input_ids=inputs, use_cache=False).logits
    return functional.cross_entropy(logits.float().flatten(0, 1), labels.flatten())


def make_optimizer(model: nn.Module, recipe: Recipe, device: torch.device) -> torch.optim.Optimizer:
    """Return AdamW that decays matrices and leaves the norms alone."""
    parameters = list(model.parameters())
    groups = [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": recipe.weight_decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=recipe.learning_rate, betas=(0.9, 0.95), fused=device.type == "cuda")


def rate_at(progress: float, recipe: Recipe) -> float:
    """Return the learning rate when ``progress`` (0 to 1) of the budget is spent: linear warm-up, then a cosine."""
    if progress < recipe.warmup_share:
        return recipe.learning_rate * (0.02 + 0.98 * progress / recipe.warmup_share)
    angle = math.pi * min(1.0, (progress - recipe.warmup_share) / (1 - recipe.warmup_share))
    share = recipe.final_share + (1 - recipe.final_share) * 0.5 * (1 + math.cos(angle))
    return recipe.learning_rate * share


@torch.no_grad()
def evaluate(model: nn.Module, stream: Tensor, bos: int, device: torch.device) -> float:
    """Return the mean loss over ``stream``, cut into windows of CONTEXT tokens (the last, shorter one is left out)."""
    windows = stream[: len(stream) // CONTEXT * CONTEXT].view(-1, CONTEXT).to(device)
    losses = [loss_of(model, *shift(part, bos)) * len(part) for part in windows.split(16)]
    return float(torch.stack(losses).sum()) / len(windows)


def train(
    model: nn.Module, windows: Windows, held_out: Tensor, recipe: Recipe, seconds: float, steps: int | None
) -> None:
    """Train in place for ``seconds``, or for exactly ``steps`` updates (which alone makes two runs comparable)."""
    device = windows.stream.device
    optimizer = make_optimizer(model, recipe, device)
    begin = reported = time.monotonic()
    step = 0
    while True:
        elapsed = time.monotonic() - begin
        progress = step / steps if steps else elapsed / seconds
        if progress >= 1:
            break
        for group in optimizer.param_groups:
            group["lr"] = rate_at(progress, recipe)
        loss = loss_of(model, *windows.draw(recipe.batch))
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        step += 1
        if step == 1 or time.monotonic() - reported >= 8:
            value = float(loss.detach())
            if not math.isfinite(value):
                raise SystemExit(f"train: the loss is {value} at step {step}; nothing was saved")
            checked = evaluate(model, held_out, windows.bos, device)
            rate = step * recipe.batch * CONTEXT / (time.monotonic() - begin)
            say(f"{elapsed:6.1f} s  step {step:6d}  loss {value:.3f}  validation {checked:.3f}  {rate:,.0f} tokens/s")
            reported = time.monotonic()
    tokens = step * recipe.batch * CONTEXT
    say(f"trained: {step} steps, {tokens / 1e6:.1f} M tokens, {tokens / len(windows.stream):.1f} times the corpus")


def save_tokenizer(tokenizer: Tokenizer, out: Path) -> None:
    """Write tokenizer.json and the little that transformers wants to know beside it."""
    tokenizer.save(str(out / "tokenizer.json"), pretty=False)
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": BOS,
        "eos_token": EOS,
        "model_max_length": CONTEXT,
        "clean_up_tokenization_spaces": False,
    }
    (out / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


def save_model(model: LlamaForCausalLM, out: Path) -> None:
    """Write config.json, generation_config.json and model.safetensors, all in BF16; ``model`` itself is rounded."""
    config = model.config
    model.generation_config = GenerationConfig(
        bos_token_id=config.bos_token_id, eos_token_id=config.eos_token_id, do_sample=False
    )
    model.to(device="cpu", dtype=torch.bfloat16)
    model.save_pretrained(out)
    (out / "model.safetensors").chmod(0o644)  # safetensors writes files that only their owner can read


def check_size(size: int, what: str) -> None:
    """Refuse ``size`` bytes that are over the demo checkpoint's limit."""
    if size >= MAX_CHECKPOINT_BYTES:
        raise SystemExit(f"train: {what} takes {size} bytes; the limit is {MAX_CHECKPOINT_BYTES}")


@torch.no_grad()
def continue_greedily(model: nn.Module, tokenizer: Tokenizer, prompt: str, count: int, device: torch.device) -> str:
    """Return ``prompt`` and up to ``count`` greedy tokens after it; stops at EOS."""
    ids: list[int] = tokenizer.encode(prompt).ids
    for _ in range(count):
        logits = model(input_ids=torch.tensor([ids], device=device), use_cache=False).logits
        token = int(logits[0, -1].argmax())
        if token == tokenizer.token_to_id(EOS):
            break
        ids.append(token)
    text: str = tokenizer.decode(ids)
    return text


def show(out: Path, held_out: Tensor, device: torch.device) -> None:
    """Load what was written, as a user would, and print its validation loss and two samples."""
    tokenizer = Tokenizer.from_file(str(out / "tokenizer.json"))
    model = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32).to(device).eval()
    loss = evaluate(model, held_out, model.config.bos_token_id, device)
    say(f"checkpoint in BF16: validation loss {loss:.3f} nats a token")
    for prompt in PROMPTS:
        say(f"--- greedy, from {prompt!r}\n{continue_greedily(model, tokenizer, prompt, 160, device)}")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Train the demo checkpoint on Python's own standard library.")
    parser.add_argument("--out", type=Path, required=True, help="directory for the checkpoint")
    parser.add_argument("--minutes", type=float, default=2.5, help="training time, without preparation (default 2.5)")
    parser.add_argument("--steps", type=int, help="train for exactly this many updates instead of --minutes")
    parser.add_argument("--device", choices=("auto", "cuda", "cpu"), default="auto")
    parser.add_argument("--batch", type=int, help="sequences an update (default: 128 on cuda, 4 on cpu)")
    parser.add_argument("--seed", type=int, default=1234)
    arguments = parser.parse_args()
    if not arguments.minutes > 0:
        parser.error("--minutes must be above 0")
    for name in ("steps", "batch"):
        if getattr(arguments, name) is not None and getattr(arguments, name) < 1:
            parser.error(f"--{name} must be 1 or more")
    if arguments.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch finds no CUDA device")
    return arguments


def main() -> None:
    arguments = parse_arguments()
    began = time.monotonic()
    kind = arguments.device
    if kind == "auto":
        kind = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(kind)
    torch.manual_seed(arguments.seed)
    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    torch.set_float32_matmul_precision("high")
    recipe = RECIPES[kind] if arguments.batch is None else Recipe(batch=arguments.batch)
    out: Path = arguments.out
    out.mkdir(parents=True, exist_ok=True)

    documents = read_corpus()
    tokenizer = train_tokenizer(documents)
    save_tokenizer(tokenizer, out)
    learned, kept_back = hold_out(documents, arguments.seed)
    stream, held_out = encode_stream(tokenizer, learned), encode_stream(tokenizer, kept_back)
    say(f"tokens: {len(stream)} to train on, {len(held_out)} held out; {time.monotonic() - began:.1f} s so far")

    model = make_model(tokenizer).to(device)
    parameters = sum(p.numel() for p in model.parameters())
    check_size(2 * parameters + (out / "tokenizer.json").stat().st_size, "the model with its tokenizer")
    say(f"model: {parameters} parameters on {kind}, {recipe.batch * CONTEXT} tokens an update")
    windows = Windows(tokenizer, stream, device, arguments.seed)
    train(model, windows, held_out, recipe, 60 * arguments.minutes, arguments.steps)

    save_model(model, out)
    size = sum(path.stat().st_size for path in out.rglob("*") if path.is_file())
    check_size(size, str(out))
    show(out, held_out, device)
    say(f"wrote {out}: {size} bytes; {time.monotonic() - began:.0f} s in all")


if __name__ == "__main__":
    main()
