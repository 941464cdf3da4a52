"""Train the demo's base model: `python -m loramux_demo.train_base --out DIR --minutes 20`.

A plain torch loop over a Qwen2 of a few million parameters. Writes DIR/dense (bf16) and DIR/nf4 (as served), each with
how it was made in demo.json.
"""

import argparse
import json
import math
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path

import tokenizers
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, IterableDataset
from transformers import Qwen2Config, Qwen2ForCausalLM

from loramux_demo.corpus import COURSE, Conversation, Corpus, check_no_held_out
from loramux_demo.muon import Muon
from loramux_demo.packing import PackedBatch, pack
from loramux_demo.tokenizer import (
    END,
    PAD,
    encode_conversations,
    save_tokenizer,
    special_id,
    train_tokenizer,
)

_CHUNK = 512
_COURSE_ROWS = 12
_CUDA_ROWS = 48
# Of the same 78 million tokens in rows of 48, half the learning rates left a loss of 0.0006 and the whole ones 0.033.
_CUDA_LR_SCALE = 0.5
_TOKENIZER_SEED_OFFSET = 1
_CONTEXT = 2048


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """How the base is built.

    Attributes:
        steps: Optimizer steps; 0 = as many as `minutes` allow.
        minutes: Wall-clock time of the loop; 0 = no limit. Decides the learning rate's schedule if `steps` is 0.
        tokenizer_conversations: How many the tokenizer learns from.
        vocab_size: Most tokens; the matrix of embeddings has as many rows as there are, up to a multiple of 64.
        rows: Rows of a batch. A drill takes as many steps with any: it gets more conversations with more rows.
        workers: Processes that make batches beside the loop; 0 = the loop makes them itself.
        length: Tokens of a row.
        longest: Tokens of a row for the few conversations that are longer.
        drills: Those of `corpus.COURSE` that come first.
        muon_lr: Peak learning rate of matrices.
        adam_lr: Peak learning rate of embeddings, norms and biases.
    """

    seed: int = 17
    steps: int = 0
    minutes: float = 20.0
    drills: tuple[str, ...] = tuple(name for name, _ in COURSE)
    vocab_size: int = 4096
    tokenizer_conversations: int = 20_000
    hidden: int = 256
    intermediate: int = 1152
    layers: int = 4
    heads: int = 8
    kv_heads: int = 4
    rope_theta: float = 1000.0
    rows: int = 12
    workers: int = 0
    length: int = 192
    longest: int = 512
    muon_lr: float = 1e-2
    adam_lr: float = 4e-3
    weight_decay: float = 0.01
    warmup: int = 30
    log_every: int = 20


def build_model(config: TrainConfig, tokenizer: tokenizers.Tokenizer) -> Qwen2ForCausalLM:
    """A randomly initialized Qwen2 in float32, embeddings tied."""
    return Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=-(-tokenizer.get_vocab_size() // 64) * 64,
            hidden_size=config.hidden,
            intermediate_size=config.intermediate,
            num_hidden_layers=config.layers,
            num_attention_heads=config.heads,
            num_key_value_heads=config.kv_heads,
            max_position_embeddings=_CONTEXT,
            rope_parameters={"rope_type": "default", "rope_theta": config.rope_theta},
            tie_word_embeddings=True,
            bos_token_id=None,
            eos_token_id=special_id(tokenizer, END),
            pad_token_id=special_id(tokenizer, PAD),
        )
    )


def compute_dtype(device: torch.device) -> torch.dtype:
    """bfloat16 where the hardware multiplies it, else float32."""
    if device.type == "cpu" and not torch.cpu.get_capabilities().get("avx512_bf16", False):
        return torch.float32
    return torch.bfloat16


def batch_loss(model: Qwen2ForCausalLM, batch: PackedBatch) -> Tensor:
    """Sum of the negative log-likelihoods of the assistant's tokens; logits exist for these only."""
    hidden = model.model(
        input_ids=batch.ids, attention_mask=batch.mask(), position_ids=batch.positions, use_cache=False
    ).last_hidden_state
    logits = model.lm_head(hidden.flatten(0, 1)[batch.learned])
    return cross_entropy(logits.float(), batch.ids.flatten()[batch.learned + 1], reduction="sum")


def learning_rate_factor(done: float, step: int, warmup: int) -> float:
    """Linear warm-up, then a cosine to 0.02 over the run.

    Args:
        done: Share of the run that is over, 0..1.
        step: Steps done.
        warmup: Steps of warm-up.
    """
    return min(1.0, (step + 1) / warmup) * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * min(1.0, done))))


def train(config: TrainConfig, out: Path, *, device: torch.device, start: Path | None = None) -> dict[str, float]:
    """Train and write `out/dense`.

    Args:
        config: Everything that decides the result.
        out: Directory, created; `dense` in it must not exist.
        device: Where to train.
        start: Dense checkpoint to go on from, with a new schedule; None = from random weights. Use another seed then,
            or the same conversations come again.

    Returns:
        Final figures: steps, loss, tokens, tokens_per_second, minutes, parameters.
    """
    directory = out / "dense"
    directory.mkdir(parents=True)
    torch.manual_seed(config.seed)
    # cuDNN's backward pass gives NaN now and then for rows of 192 tokens with a mask (pytorch/pytorch#196678).
    torch.backends.cuda.enable_cudnn_sdp(False)
    if start is None:
        conversations = _checked(Corpus(config.seed + _TOKENIZER_SEED_OFFSET), config.tokenizer_conversations)
        tokenizer = train_tokenizer(conversations, vocab_size=config.vocab_size)
        model = build_model(config, tokenizer)
    else:
        tokenizer = tokenizers.Tokenizer.from_file(str(start / "tokenizer.json"))
        model = Qwen2ForCausalLM.from_pretrained(start, dtype=torch.float32)
    torch.nn.Module.to(model, device)
    model.train()
    parameters = sum(parameter.numel() for parameter in model.parameters())
    _say(f"{parameters / 1e6:.2f}M parameters, {tokenizer.get_vocab_size()} tokens in the vocabulary")
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and "embed" not in name]
    others = [p for name, p in model.named_parameters() if p.ndim != 2 or "embed" in name]
    dtype = compute_dtype(device)
    muon = Muon(matrices, weight_decay=config.weight_decay, dtype=dtype)
    adam = torch.optim.AdamW(others, lr=config.adam_lr, betas=(0.9, 0.95), weight_decay=0.0)
    loader = DataLoader(
        _Batches(config, tokenizer),
        batch_size=None,
        num_workers=config.workers,
        # The tokenizer's threads do not survive a fork.
        multiprocessing_context="spawn" if config.workers else None,
    )
    started = time.monotonic()
    step, tokens, loss = 0, 0, math.inf
    recent: list[Tensor] = []
    for batches in loader:
        elapsed = time.monotonic() - started
        done = step / config.steps if config.steps else elapsed / (config.minutes * 60)
        if done >= 1 or (config.minutes and elapsed >= config.minutes * 60):
            break
        factor = learning_rate_factor(done, step, config.warmup)
        targets = sum(len(batch.learned) for batch in batches)
        for batch in batches:
            with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
                part = batch_loss(model, batch.to(device)) / targets
            part.backward()
            recent.append(part.detach())
            tokens += batch.ids.numel()
        torch.nn.utils.clip_grad_norm_(others, 1.0)
        muon.step(config.muon_lr * factor)
        for group in adam.param_groups:
            group["lr"] = config.adam_lr * factor
        adam.step()
        model.zero_grad(set_to_none=True)
        step += 1
        # Read only here: reading a loss waits for the device.
        if step % config.log_every == 0:
            loss, recent = torch.stack(recent).sum().item() / config.log_every, []
            elapsed = time.monotonic() - started
            _say(
                f"step {step} ({100 * done:.0f} %) loss {loss:.4f} lr x{factor:.2f} "
                f"{tokens / elapsed:.0f} tokens/s {elapsed / 60:.1f} min"
            )
            if not math.isfinite(loss):
                raise FloatingPointError(f"the loss is {loss} at step {step}; lower the learning rates")
    if recent:
        loss = torch.stack(recent).sum().item() / (step % config.log_every)
    elapsed = time.monotonic() - started
    torch.nn.Module.to(model, torch.bfloat16)
    model.save_pretrained(directory)
    save_tokenizer(tokenizer, directory, max_length=_CONTEXT)
    return {
        "steps": step,
        "loss": loss,
        "tokens": tokens,
        "tokens_per_second": tokens / elapsed,
        "minutes": elapsed / 60,
        "parameters": parameters,
    }


def main(arguments: list[str] | None = None) -> int:
    """Command line."""
    defaults = TrainConfig()
    parser = argparse.ArgumentParser(prog="python -m loramux_demo.train_base", description="Train the demo's base.")
    parser.add_argument("--out", type=Path, required=True, help="new directory; gets dense/ and nf4/")
    parser.add_argument("--minutes", type=float, default=None, help=f"wall-clock time ({defaults.minutes})")
    parser.add_argument("--steps", type=int, default=defaults.steps, help="steps; makes the result reproducible")
    parser.add_argument("--seed", type=int, default=defaults.seed)
    parser.add_argument("--start", type=Path, help="dense checkpoint to go on from (with another --seed)")
    parser.add_argument(
        "--drills", nargs="*", choices=[name for name, _ in COURSE], help="what comes first (all; with --start none)"
    )
    parser.add_argument(
        "--lr-scale",
        type=float,
        help=f"times both learning rates; 0.3 suits --start (1; with cuda {_CUDA_LR_SCALE})",
    )
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--rows", type=int, help=f"rows of a batch ({defaults.rows}; with cuda {_CUDA_ROWS})")
    options = parser.parse_args(arguments)
    if (options.out / "dense").exists() or (options.out / "nf4").exists():
        parser.error(f"--out {options.out} holds a base already; give a new directory")
    minutes = options.minutes if options.minutes is not None else (0.0 if options.steps else defaults.minutes)
    if options.rows is not None and options.rows < 1:
        parser.error(f"--rows {options.rows} must be 1 or more")
    if not options.steps and minutes <= 0:
        parser.error("--minutes must be positive unless --steps is given")
    drills = options.drills if options.drills is not None else () if options.start else defaults.drills
    device = torch.device(options.device)
    lr_scale = options.lr_scale if options.lr_scale is not None else _CUDA_LR_SCALE if device.type == "cuda" else 1.0
    config = TrainConfig(
        rows=options.rows or (_CUDA_ROWS if device.type == "cuda" else defaults.rows),
        # A GPU takes tokens faster than the loop makes them.
        workers=1 if device.type == "cuda" else 0,
        seed=options.seed,
        steps=options.steps,
        minutes=minutes,
        drills=tuple(drills),
        muon_lr=defaults.muon_lr * lr_scale,
        adam_lr=defaults.adam_lr * lr_scale,
    )
    figures = train(config, options.out, device=device, start=options.start)
    made: dict[str, object] = {"parameters": figures["parameters"], "config": asdict(config), "figures": figures}
    if options.start is not None:
        made["start"] = json.loads((options.start / "demo.json").read_text(encoding="utf-8"))
    (options.out / "dense" / "demo.json").write_text(json.dumps(made, indent=2) + "\n", encoding="utf-8")
    _say(" ".join(f"{name} {value:.4g}" for name, value in figures.items()))
    from loramux_server.model.quantize import quantize_checkpoint

    quantize_checkpoint(options.out / "dense", options.out / "nf4")
    _say(f"quantized to {options.out / 'nf4'}")
    return 0


class _Batches(IterableDataset[list[PackedBatch]]):
    """The endless stream of batches that a config decides."""

    def __init__(self, config: TrainConfig, tokenizer: tokenizers.Tokenizer) -> None:
        self._config = config
        self._tokenizer = tokenizer

    def __iter__(self) -> Iterator[list[PackedBatch]]:
        config = self._config
        course = [(drill, count * config.rows // _COURSE_ROWS) for drill, count in COURSE if drill in config.drills]
        return pack(
            self._encoded(Corpus(config.seed, course=course)),
            rows=config.rows,
            length=config.length,
            longest=config.longest,
            pad_id=special_id(self._tokenizer, PAD),
        )

    def _encoded(self, corpus: Corpus) -> Iterator[tuple[list[int], list[int]]]:
        while True:
            yield from encode_conversations(self._tokenizer, _checked(corpus, _CHUNK))


def _checked(corpus: Corpus, count: int) -> list[Conversation]:
    conversations = list(islice(corpus, count))
    check_no_held_out(conversations)
    return conversations


def _say(line: str) -> None:
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    raise SystemExit(main())
