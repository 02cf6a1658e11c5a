"""Beam searches that are held against `generate` of transformers, through the engine and the reference backend."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from pellucid.backends.base import Backend
from pellucid.core.config import SchedulerConfig
from pellucid.core.outputs import CompletionOutput
from pellucid.core.sampling_params import SamplingParams
from pellucid.models.kv_groups import kv_groups
from tests.parity.cases import TINY, tiny_tokens
from tests.support.engines import CheckedEngine
from tests.support.fake_tokenizer import FakeTokenizer

TINY_EOS = (3, 17, 29, 44, 58, 71)
"""Of 96 tokens: so many that searches of a few tokens see beams end at all times."""

SMOLLM2 = "smollm2-135m-instruct"
SMOLLM2_EOS = (0, 2)


PROCESSORS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "none": ({}, {}),
    "min_tokens": ({"min_tokens": 6}, {"min_new_tokens": 6}),
    "banned": ({"banned_token_ids": (5, 8, 9, 20, 41, 77)}, {"suppress_tokens": [5, 8, 9, 20, 41, 77]}),
    "bias": ({"logit_bias": {3: 4, 20: 2.5, 77: -9}}, {"sequence_bias": [[[3], 4.0], [[20], 2.5], [[77], -9.0]]}),
    "ngrams": ({"no_repeat_ngram_size": 2}, {"no_repeat_ngram_size": 2}),
}
"""What changes the log-probabilities, for `SamplingParams` and for `generate`."""


@dataclass(frozen=True)
class BeamCase:
    """A request, in terms of `SamplingParams` and of transformers alike.

    Attributes:
        model: one of TINY, or SMOLLM2.
        prompt: token ids.
        processors: one of PROCESSORS.
    """

    name: str
    model: str
    prompt: list[int] = field(repr=False)
    max_tokens: int
    num_beams: int
    n: int = 1
    length_penalty: float = 1.0
    early_stopping: Any = False
    processors: str = "none"

    @property
    def eos(self) -> tuple[int, ...]:
        return SMOLLM2_EOS if self.model == SMOLLM2 else TINY_EOS

    @property
    def params(self) -> SamplingParams:
        return SamplingParams(
            max_tokens=self.max_tokens,
            temperature=0,
            num_beams=self.num_beams,
            n=self.n,
            length_penalty=self.length_penalty,
            early_stopping=self.early_stopping,
            detokenize=False,
            **PROCESSORS[self.processors][0],
        )

    @property
    def generate_arguments(self) -> dict[str, Any]:
        """Of `generate`."""
        return {
            "max_new_tokens": self.max_tokens,
            "num_beams": self.num_beams,
            "num_return_sequences": self.n,
            "length_penalty": self.length_penalty,
            "early_stopping": self.early_stopping,
            "eos_token_id": list(self.eos),
            "pad_token_id": self.eos[0],
            "do_sample": False,
            "renormalize_logits": True,
            **PROCESSORS[self.processors][1],
        }


def _tiny_cases(model: str) -> list[BeamCase]:
    cases = []
    tokens = tiny_tokens(TINY[model])
    for begin, length in ((0, 5), (20, 70), (90, 1)):
        prompt = tokens[begin : begin + length]
        for num_beams, n in ((2, 1), (4, 4), (5, 3)):
            for penalty, early in ((1.0, False), (0.0, "never"), (2.0, True), (-0.7, False), (1.5, "never")):
                name = f"{length}-{num_beams}-{penalty}-{early}"
                cases.append(BeamCase(name, model, prompt, 12, num_beams, n, penalty, early))
        for processors in list(PROCESSORS)[1:] if model == "llama" else ():
            name = f"{length}-{processors}"
            cases.append(BeamCase(name, model, prompt, 12, 3, 2, processors=processors))
    return cases


def _smollm2_cases() -> list[BeamCase]:
    return [
        BeamCase(
            f"{question}-{num_beams}-{penalty}-{early}",
            SMOLLM2,
            [int(token) for token in prompt.split()],
            16,
            num_beams,
            n,
            penalty,
            early,
        )
        for question, prompt in SMOLLM2_PROMPTS.items()
        for num_beams, n, penalty, early in ((3, 1, 1.0, False), (4, 4, 0.6, True), (4, 2, 2.0, "never"))
    ]


_SYSTEM = "1 9690 198 2683 359 253 5356 5646 11173 3365 3511 308 34519 28 7018 411 407 19712 8182 2 198"
SMOLLM2_PROMPTS = {
    # "What is the capital of France?" and "Name three colors.", as the chat template puts them
    "capital": f"{_SYSTEM} 1 4093 198 1780 314 260 3575 282 4649 47 2 198 1 520 9531 198",
    "colors": f"{_SYSTEM} 1 4093 198 5820 1296 4683 30 2 198 1 520 9531 198",
    # "The river had risen in the night, and"
    "river": "504 4626 761 20367 281 260 3163 28 284",
}
BEAM_CASES = {"llama": _tiny_cases("llama"), "gemma3": _tiny_cases("gemma3"), SMOLLM2: _smollm2_cases()}
"""By model."""


class EosTokenizer(FakeTokenizer):
    """Knows nothing but which tokens end a sequence."""

    def __init__(self, eos_token_ids: tuple[int, ...]) -> None:
        self.eos_token_ids = frozenset(eos_token_ids)


def answers(backend: Backend, cases: list[BeamCase]) -> list[list[CompletionOutput]]:
    """What an engine over `backend` answers to `cases` of one model, all at once."""
    num_groups = len(kv_groups(backend.spec))
    num_blocks = num_groups * 4 * sum(case.num_beams for case in cases)
    backend.allocate_kv_cache(num_blocks)
    engine = CheckedEngine(
        backend,
        EosTokenizer(cases[0].eos),
        SchedulerConfig(max_num_seqs=32, max_num_batched_tokens=128),
        num_blocks=num_blocks,
        max_model_len=200,
    )
    for case in cases:
        engine.add_request(case.name, case.prompt, case.params)
    engine.run()
    for reply in engine.replies.values():
        assert reply.error is None, reply.error
    return [engine.replies[case.name].outputs for case in cases]
