"""Adapters of every kind and the base, mixed in one batch over gRPC, against PEFT one by one, in fp32."""

import asyncio
import random
from collections.abc import Mapping
from pathlib import Path

import pytest

from loramux import AsyncClient, GenerationResult
from tests.e2e.real_server import RealServer

USERS = ("base", "v1", "attention", "rslora", "pattern")
PROMPTS = 2
MAX_TOKENS = 24
TOLERANCE = 1e-4


def _oracle(
    checkpoint: Path, adapter: Path | None, prompts: list[list[int]]
) -> list[tuple[list[int], list[list[float]]]]:
    """Greedy tokens of each prompt by PEFT and, at each position of prompt and output, all log-probabilities."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32, attn_implementation="eager")
    if adapter is not None:
        model = PeftModel.from_pretrained(model, str(adapter))
    model.eval()
    answers = []
    with torch.inference_mode():
        for prompt in prompts:
            ids = list(prompt)
            for _ in range(MAX_TOKENS):
                ids.append(int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
            logprobs = torch.log_softmax(model(input_ids=torch.tensor([ids])).logits[0].float(), dim=-1)
            answers.append((ids[len(prompt) :], logprobs.tolist()))
    return answers


async def test_mixed_adapters_answer_as_peft_does(
    server: RealServer, checkpoint: Path, adapters: Mapping[str, Path]
) -> None:
    prompts = [random.Random(400 + index).choices(range(3, 500), k=17 + 9 * index) for index in range(PROMPTS)]
    expected = {user: _oracle(checkpoint, adapters.get(user), prompts) for user in USERS}

    async with AsyncClient(server.address) as client:

        async def greedy(user: str, prompt: list[int]) -> GenerationResult:
            name = None if user == "base" else user
            stream = client.generate(
                prompt, adapter=name, temperature=0, max_tokens=MAX_TOKENS, ignore_eos=True, logprobs=0
            )
            return await stream.result()

        async def forced(user: str, token_ids: list[int]) -> GenerationResult:
            name = None if user == "base" else user
            return await client.generate(
                token_ids, adapter=name, temperature=0, max_tokens=1, prompt_logprobs=3, ignore_eos=True
            ).result()

        jobs = [(user, index) for user in USERS for index in range(PROMPTS)]
        steps = server.metric("loramux_engine_steps_total")
        answers = await asyncio.gather(*(greedy(user, prompts[index]) for user, index in jobs))
        await asyncio.sleep(0.3)  # the engine reports its counters every quarter of a second
        steps = server.metric("loramux_engine_steps_total") - steps
        assert steps < len(jobs) * MAX_TOKENS / 2, "they ran in one batch"
        teacher = await asyncio.gather(
            *(forced(user, [*prompts[index], *expected[user][index][0]]) for user, index in jobs)
        )

    assert len({result.token_ids for result in answers}) == len(jobs), "every adapter changes the answer"
    worst = 0.0
    for (user, index), answer, forcing in zip(jobs, answers, teacher, strict=True):
        tokens, logprobs = expected[user][index]
        start = len(prompts[index])
        assert list(answer.token_ids) == tokens, f"{user}, prompt {index}"
        for position, entry in enumerate(answer.outputs[0].logprobs):
            assert entry.token.logprob == pytest.approx(logprobs[start - 1 + position][tokens[position]], abs=TOLERANCE)
        ids = [*prompts[index], *tokens]
        assert [entry.token.token_id for entry in forcing.prompt_logprobs] == ids
        assert forcing.prompt_logprobs[0].token.logprob is None
        for position, entry in enumerate(forcing.prompt_logprobs[1:], start=1):
            row = logprobs[position - 1]
            assert entry.token.logprob == pytest.approx(row[ids[position]], abs=TOLERANCE)
            assert entry.token.logprob is not None
            worst = max(worst, abs(entry.token.logprob - row[ids[position]]))
            for top in entry.top:
                assert top.logprob == pytest.approx(row[top.token_id], abs=TOLERANCE)
            assert entry.top[0].logprob == pytest.approx(max(row), abs=TOLERANCE)
    print(f"worst difference of a log-probability: {worst:.2e}")
