"""Judge a base in transformers: `python -m loramux_demo.evaluate --model DIR/nf4 --count 200`.

A pre-quantized directory is dequantized once (transformers rounds to bfloat16), then run in float32, fast on CPUs.
"""

import argparse
import dataclasses
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from loramux_demo.judge import CATEGORIES, Messages, base_items, judge, table

REQUIRED_ACCURACY = 0.9
_BATCH = 64


class TransformersModel:
    """A checkpoint in transformers that answers chats greedily.

    Args:
        directory: Dense or NF4 checkpoint with its tokenizer.
        max_new_tokens: Most tokens of an answer.
    """

    def __init__(self, directory: Path, *, max_new_tokens: int = 360) -> None:
        self._tokenizer = AutoTokenizer.from_pretrained(directory, padding_side="left")
        model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
        if getattr(model, "is_quantized", False):
            model = model.dequantize()
        self._model = model.float().eval()
        self._max_new_tokens = max_new_tokens

    def __call__(self, chats: Sequence[Messages]) -> list[str]:
        """The answers, in order."""
        prompts = [
            str(self._tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)) for chat in chats
        ]
        order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
        answers = [""] * len(prompts)
        for start in range(0, len(order), _BATCH):
            chosen = order[start : start + _BATCH]
            for index, text in zip(chosen, self._answer([prompts[index] for index in chosen]), strict=True):
                answers[index] = text
        return answers

    @torch.inference_mode()
    def _answer(self, prompts: list[str]) -> list[str]:
        inputs = self._tokenizer(prompts, return_tensors="pt", padding=True, add_special_tokens=False)
        output = self._model.generate(
            input_ids=inputs["input_ids"],
            attention_mask=inputs["attention_mask"],
            max_new_tokens=self._max_new_tokens,
            do_sample=False,
        )
        width = inputs["input_ids"].shape[1]
        texts: list[str] = self._tokenizer.batch_decode(output[:, width:], skip_special_tokens=True)
        return texts


def main(arguments: list[str] | None = None) -> int:
    """Command line; exit status 5 if a category is under `REQUIRED_ACCURACY`."""
    parser = argparse.ArgumentParser(prog="python -m loramux_demo.evaluate", description="Judge a demo base.")
    parser.add_argument("--model", type=Path, required=True, help="dense or NF4 checkpoint")
    parser.add_argument("--count", type=int, default=200, help="questions of a category (200)")
    parser.add_argument("--seed", type=int, default=5)
    parser.add_argument("--categories", nargs="*", choices=CATEGORIES, default=list(CATEGORIES))
    parser.add_argument("--json", type=Path, help="also write the scores here")
    options = parser.parse_args(arguments)
    scores = judge(
        base_items(options.count, seed=options.seed, categories=options.categories), TransformersModel(options.model)
    )
    sys.stdout.write(table(scores) + "\n")
    if options.json is not None:
        plain = {category: dataclasses.asdict(value) for category, value in scores.items()}
        options.json.write_text(json.dumps(plain, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    return 0 if all(value.accuracy >= REQUIRED_ACCURACY for value in scores.values()) else 5


if __name__ == "__main__":
    raise SystemExit(main())
