"""Compares answers with transformers and PEFT on a real checkpoint: the same weights, the same tokens.

    python bench/parity.py --model ./checkpoint --weights fp32      # greedy answers must be equal, token by token
    python bench/parity.py --model ./checkpoint-nf4 --weights nf4   # log-probabilities within the tolerance
    python bench/parity.py --model ./random-7b --weights nf4 --device cuda --random-prompts --adapter DIR ...

Without `--adapter`, three adapters are made with PEFT (r = 4, 8 with rsLoRA and another set of targets, 16 with a
rank_pattern) and served mixed with the base in one batch; PEFT answers one by one. Exits 1 when a comparison fails.
"""

import argparse
import random
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from loramux_base.adapter import version_digest
from loramux_base.template import ChatTemplate
from loramux_server.engine.config import EngineConfig
from loramux_server.engine.engine import Engine
from loramux_server.engine.messages import Add, Done, PromptLogprobs, PutVersion, SamplingSpec, Tokens, VersionSpec
from loramux_server.engine.runner import build_runner
from loramux_server.text.tokenizer import Tokenizer

PROMPTS = (
    "Write a haiku about the sea.",
    "What is the capital of France, and which river runs through it?",
    "请用一句话介绍长城。",
    "用中文解释什么是递归。",
    "Explain this emoji sequence: 🚀🌙👩‍🚀",
    "Write a Python function that returns the n-th Fibonacci number.",
    "Fix this SQL: SELCT name FORM users WHER id == 3;",
    "Say hello in English, 中文 and with an emoji.",
)
# |difference| of a log-probability. float32: both sides sum in other orders. bfloat16: one rounding of an activation is
# 2^-9 relative, and they add up over the layers.
TOLERANCE = {"float32": 2e-3, "bfloat16": 0.25}


def main() -> None:
    """Run the comparisons that fit the weights mode."""
    arguments = _arguments()
    with tempfile.TemporaryDirectory(prefix="loramux-parity-") as temporary:
        failed = _compare(arguments, Path(temporary))
    sys.exit(1 if failed else 0)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, type=Path)
    parser.add_argument("--weights", required=True, choices=["nf4", "bf16", "fp32"])
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--adapter", action="append", type=Path, help="PEFT directory; repeat")
    parser.add_argument("--random-prompts", action="store_true", help="random token ids instead of the chat prompts")
    parser.add_argument("--new", type=int, default=48, help="output tokens")
    return parser.parse_args()


class Served:
    """Our engine, asked for greedy tokens and for log-probabilities of given tokens."""

    def __init__(self, arguments: argparse.Namespace, adapters: list[Path]) -> None:
        config = EngineConfig(model=str(arguments.model), weights=arguments.weights, device=arguments.device)
        self.runner = build_runner(config)
        self._engine = Engine.serving(config, self.runner, self.runner.ready)
        self._versions: list[str | None] = [None]
        for index, path in enumerate(adapters):
            version = f"tenants/default/adapters/a{index}/versions/0"
            spec = VersionSpec(version=version, digest=version_digest(path), path=str(path))
            self._engine.handle([PutVersion(spec=spec)])
            self._versions.append(version)
        self._number = 0

    def generate(self, prompts: list[list[int]], adapters: list[int], **fields: Any) -> list[list[int]]:
        """Greedy tokens of all prompts in one batch; adapter 0 is the base."""
        outputs: dict[str, list[int]] = {}
        for event in self._events(prompts, adapters, outputs, fields):
            if isinstance(event, Tokens):
                outputs[event.request_id].extend(event.token_ids)
        return list(outputs.values())

    def logprobs(self, sequences: list[list[int]], adapters: list[int]) -> list[list[tuple[float, int, float]]]:
        """(log-probability of the token, best token, margin of the two best) from the second token on."""
        scores: dict[str, list[tuple[float, int, float]]] = {}
        for event in self._events(sequences, adapters, scores, {"max_tokens": 1, "prompt_logprobs": 2}):
            if isinstance(event, PromptLogprobs):
                scores[event.request_id].extend(
                    (entry.logprob, entry.top[0][0], entry.top[0][1] - entry.top[1][1]) for entry in event.entries
                )
        return list(scores.values())

    def _events(
        self, prompts: list[list[int]], adapters: list[int], results: dict[str, Any], fields: dict[str, Any]
    ) -> Iterator[object]:
        for prompt, adapter in zip(prompts, adapters, strict=True):
            self._number += 1
            results[str(self._number)] = []
            sampling = SamplingSpec(**{"temperature": 0.0, **fields})
            version = self._versions[adapter]
            self._engine.handle(
                [Add(request_id=str(self._number), prompt_token_ids=prompt, sampling=sampling, version=version)]
            )
        done = 0
        while done < len(prompts):
            for event in self._engine.step():
                if isinstance(event, Done):
                    if event.status != "finished":
                        raise RuntimeError(f"request {event.request_id} {event.status}: {event.error}")
                    done += 1
                yield event


class Oracle:
    """transformers on the same weights, with PEFT adapters switched one by one."""

    def __init__(self, arguments: argparse.Namespace, adapters: list[Path], dtype: torch.dtype) -> None:
        from peft import PeftModel
        from transformers import AutoModelForCausalLM

        model = AutoModelForCausalLM.from_pretrained(
            arguments.model, dtype=dtype, device_map={"": arguments.device}, local_files_only=True
        ).eval()
        if arguments.device == "cpu":
            model = _dense(model).to(dtype)
        for index, path in enumerate(adapters):
            if index == 0:
                model = PeftModel.from_pretrained(model, path, adapter_name="a0")
            else:
                model.load_adapter(str(path), adapter_name=f"a{index}")
        self._model = model.eval()
        self._has_adapters = bool(adapters)
        self._device = arguments.device

    @torch.inference_mode()
    def logprobs(self, tokens: list[int], adapter: int) -> torch.Tensor:
        """`[T - 1, V]` float32 log-probabilities of the token after each."""
        ids = torch.tensor([tokens], device=self._device)
        if adapter:
            self._model.set_adapter(f"a{adapter - 1}")
            logits = self._model(ids).logits
        elif self._has_adapters:
            with self._model.disable_adapter():
                logits = self._model(ids).logits
        else:
            logits = self._model(ids).logits
        return logits[0, :-1].float().log_softmax(-1)

    def generate(self, tokens: list[int], new: int, end: list[int]) -> list[int]:
        """Greedy tokens through `generate` with a neutral generation config."""
        from transformers import GenerationConfig

        ids = torch.tensor([tokens], device=self._device)
        config = GenerationConfig(do_sample=False, max_new_tokens=new, eos_token_id=end, pad_token_id=end[0])
        output = self._model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=config)
        return output[0, len(tokens) :].tolist()


def _dense(model: torch.nn.Module) -> torch.nn.Module:
    """Replace bitsandbytes' layers by dense ones of the weights that it dequantizes.

    Its product on CPU may compute in bfloat16 whatever is asked, which is coarser than what is compared here.
    """
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if type(child).__name__ == "Linear4bit":
                state = child.weight.quant_state
                weight = torch.ops.bitsandbytes.dequantize_4bit(
                    child.weight.data, state.absmax, state.blocksize, state.quant_type, state.shape, torch.float32
                )
                linear = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=child.bias is not None)
                linear.weight.data = weight
                if child.bias is not None:
                    linear.bias.data = child.bias.data
                setattr(parent, name, linear)
    for attribute in ("is_loaded_in_4bit", "is_quantized", "hf_quantizer", "quantization_method"):
        if hasattr(model, attribute):
            setattr(model, attribute, None)
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    return model


def _compare(arguments: argparse.Namespace, work: Path) -> bool:
    tokenizer = Tokenizer.from_directory(arguments.model)
    if arguments.random_prompts:
        generator = random.Random(1)
        prompts = [[generator.randrange(3, tokenizer.vocab_size) for _ in range(64)] for _ in range(8)]
    else:
        template = ChatTemplate.from_directory(arguments.model)
        prompts = [
            tokenizer.encode(template.render([{"role": "user", "content": text}]), add_special_tokens=False)
            for text in PROMPTS
        ]
    end = list(tokenizer.eos_token_ids)
    adapters = arguments.adapter or make_adapters(arguments.model, work)
    served = Served(arguments, adapters)
    dtype = torch.float32 if served.runner.ready.details["dtype"] == "float32" else torch.bfloat16
    oracle = Oracle(arguments, adapters, dtype)
    failed = False
    base = [0] * len(prompts)
    alone = [served.generate([prompt], [0], max_tokens=arguments.new, eos_token_ids=end)[0] for prompt in prompts]
    if arguments.weights == "fp32":
        with_oracle = _plain_oracle(arguments)
        expected = [with_oracle.generate(prompt, arguments.new, end) for prompt in prompts]
        together = served.generate(prompts, base, max_tokens=arguments.new, eos_token_ids=end)
        for name, got in (("alone", alone), ("together", together)):
            equal = sum(a == b for a, b in zip(got, expected, strict=True))
            print(f"greedy, {name}: {equal}/{len(prompts)} answers equal transformers' generate")
            failed |= equal != len(prompts)
    mixed = [index % (len(adapters) + 1) for index in range(len(prompts))]
    answers = served.generate(prompts, mixed, max_tokens=arguments.new, eos_token_ids=end)
    differ = sum(a != b for a, b, which in zip(answers, alone, mixed, strict=True) if which)
    print(f"adapters change {differ} of {sum(map(bool, mixed))} answers")
    for name, which, texts in (("base", base, alone), ("mixed adapters", mixed, answers)):
        sequences = [prompt + answer for prompt, answer in zip(prompts, texts, strict=True)]
        failed |= _teacher_forced(name, served, oracle, sequences, which, TOLERANCE[str(dtype).removeprefix("torch.")])
    served.runner.close()
    return failed


def _plain_oracle(arguments: argparse.Namespace) -> Oracle:
    return Oracle(arguments, [], torch.float32)


def _teacher_forced(
    name: str, served: Served, oracle: Oracle, sequences: list[list[int]], adapters: list[int], tolerance: float
) -> bool:
    worst, compared, argmax_checked, argmax_wrong = 0.0, 0, 0, 0
    off, moved, adapted = 0.0, 0.0, 0
    for tokens, adapter, ours in zip(sequences, adapters, served.logprobs(sequences, adapters), strict=True):
        theirs = oracle.logprobs(tokens, adapter).cpu()
        chosen = theirs.gather(1, torch.tensor(tokens[1:])[:, None])[:, 0].tolist()
        best = theirs.argmax(-1).tolist()
        assert len(ours) == len(chosen), (len(ours), len(chosen))
        if adapter:
            without = oracle.logprobs(tokens, 0).cpu().gather(1, torch.tensor(tokens[1:])[:, None])[:, 0].tolist()
            off += sum(abs(mine[0] - other) for mine, other in zip(ours, chosen, strict=True))
            moved += sum(abs(one - other) for one, other in zip(chosen, without, strict=True))
            adapted += len(chosen)
        for (logprob, top, margin), expected, expected_top in zip(ours, chosen, best, strict=True):
            worst = max(worst, abs(logprob - expected))
            compared += 1
            if margin > tolerance:
                argmax_checked += 1
                argmax_wrong += top != expected_top
    ok = worst <= tolerance and not argmax_wrong
    print(
        f"teacher-forced, {name}: {compared} tokens, max |log-probability difference| {worst:.2e} "
        f"(tolerance {tolerance:g}); argmax differs on {argmax_wrong} of {argmax_checked} with a margin over the "
        f"tolerance: {'ok' if ok else 'FAILED'}"
    )
    if adapted:
        # An adapter that hardly moves its tokens proves nothing: the served answer has to follow it, not the base.
        print(f"  adapters move their tokens by {moved / adapted:.4f} on average; we are off by {off / adapted:.4f}")
        ok &= off <= 0.1 * moved
    return not ok


def make_adapters(model: Path, work: Path) -> list[Path]:
    """Three PEFT adapters with B non-zero; ranks, scalings and targets differ."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoConfig, AutoModelForCausalLM

    settings: list[dict[str, Any]] = [
        {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"]},
        {"r": 8, "lora_alpha": 8, "use_rslora": True, "target_modules": ["o_proj", "gate_proj", "down_proj"]},
        {
            "r": 16,
            "lora_alpha": 32,
            "target_modules": "all-linear",
            "rank_pattern": {"up_proj": 8, "layers.1.self_attn.k_proj": 3},
        },
    ]
    config = AutoConfig.from_pretrained(model, local_files_only=True)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    directories: list[Path] = []
    for index, fields in enumerate(settings):
        torch.manual_seed(index)
        with torch.device("meta"):
            base = AutoModelForCausalLM.from_config(config)
            tuned = get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", **fields))
        state = {}
        for name, parameter in tuned.named_parameters():
            if "lora_" in name:
                scale = parameter.shape[1] ** -0.5 if "lora_A" in name else 0.02
                state[name.replace(".default", "")] = torch.randn(parameter.shape) * scale
        directory = work / f"adapter{index}"
        directory.mkdir()
        from safetensors.torch import save_file

        save_file(state, directory / "adapter_model.safetensors", metadata={"format": "pt"})
        tuned.peft_config["default"].save_pretrained(directory)
        directories.append(directory)
    return directories


if __name__ == "__main__":
    main()
