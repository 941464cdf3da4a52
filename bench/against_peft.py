"""transformers + PEFT on the same checkpoint: `generate` over a batch that mixes adapters by `adapter_names`.

One process, one static batch: all prompts have one length, every request gives as many tokens. Prefill is timed apart,
by a `generate` of one token. There is no arrival time for each token, so TTFT is the prefill's and gaps are means.
"""

import contextlib
import gc
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from drive import random_prompts
from measure import Row
from workload import Adapters

_BASE = "__base__"
"""PEFT's name for rows of a mixed batch that use no adapter."""


class PeftBench:
    """A base model with PEFT adapters, and its mixed-batch `generate`.

    Args:
        model: Checkpoint directory, dense or NF4.
        adapters: PEFT directories.
        device: `cpu` or `cuda`.
    """

    def __init__(self, model: Path, adapters: Sequence[Path], *, device: str) -> None:
        from peft import PeftModel
        from transformers import AutoModelForCausalLM

        self._device = device
        dtype = torch.bfloat16 if device == "cuda" else torch.float32
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            model, dtype=dtype, device_map={"": device}, local_files_only=True
        ).eval()
        self.resident_weight_bytes = loaded.get_memory_footprint()
        self.vocab = int(loaded.config.vocab_size)
        for index, path in enumerate(adapters):
            if index == 0:
                loaded = PeftModel.from_pretrained(loaded, path, adapter_name="a0")
            else:
                loaded.load_adapter(str(path), adapter_name=f"a{index}")
        self._mixes = bool(adapters)
        self._model = loaded.eval()
        self._runs = 0

    def run(
        self, *, concurrency: int, adapters: Adapters, prompt: int, new: int, spec: dict[str, object], sampling: str
    ) -> Row:
        """Time one batch.

        Args:
            concurrency: Rows.
            adapters: Whose adapters they use, round robin.
            prompt: Prompt tokens.
            new: Output tokens, at least 2.
            spec: Sampling fields, as `workload.SAMPLING`.
            sampling: Their name.
        """
        self._runs += 1
        prompts = random_prompts(concurrency, prompt, vocab=self.vocab, seed=30_000 + self._runs)
        picks = adapters.picks(concurrency, seed=self._runs)
        ids = torch.tensor(prompts, device=self._device)
        first = self._generate(ids, picks, 1, spec)
        whole = self._generate(ids, picks, new, spec)
        decode_seconds = max(whole - first, 1e-9)
        decode = concurrency * (new - 1) / decode_seconds
        gap = 1000 * decode_seconds / (new - 1)
        return Row(
            path="peft",
            sampling=sampling,
            adapters=adapters.label,
            concurrency=concurrency,
            prompt=prompt,
            new=new,
            decode=decode,
            step_ms=1000 * concurrency / decode,
            prefill=concurrency * prompt / first,
            output=concurrency * new / whole,
            ttft_p50=1000 * first,
            ttft_p99=1000 * first,
            gap_p50=gap,
            gap_p99=gap,
            resident_weight_bytes=self.resident_weight_bytes,
        )

    def close(self) -> None:
        """Give the memory back."""
        del self._model
        gc.collect()
        if self._device == "cuda":
            torch.cuda.empty_cache()

    def _generate(self, ids: torch.Tensor, picks: Sequence[int | None], new: int, spec: dict[str, object]) -> float:
        from transformers import GenerationConfig

        sampled = spec.get("temperature", 0.0) != 0.0
        fields = {name: spec[name] for name in ("temperature", "top_p", "top_k") if name in spec} if sampled else {}
        # min_new_tokens keeps the end token out, as ignore_eos does on our side.
        config = GenerationConfig(
            do_sample=sampled, max_new_tokens=new, min_new_tokens=new, pad_token_id=0, eos_token_id=2, **fields
        )
        mixed = any(pick is not None for pick in picks)
        names = {"adapter_names": [_BASE if pick is None else f"a{pick}" for pick in picks]} if mixed else {}
        plain = self._mixes and not mixed
        self._synchronize()
        began = time.perf_counter()
        with torch.inference_mode(), self._model.disable_adapter() if plain else contextlib.nullcontext():
            output = self._model.generate(
                input_ids=ids, attention_mask=torch.ones_like(ids), generation_config=config, **names
            )
        self._synchronize()
        seconds = time.perf_counter() - began
        if output.shape[1] != ids.shape[1] + new:
            raise RuntimeError(f"generate gave {output.shape[1] - ids.shape[1]} tokens a row where {new} were asked")
        return seconds

    def _synchronize(self) -> None:
        if self._device == "cuda":
            torch.cuda.synchronize()
