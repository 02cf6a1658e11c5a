"""From what a caller asks for to a sequence group, checked against the model and the limits of the engine."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from collections.abc import Sequence as ListLike
from dataclasses import dataclass, replace
from typing import Any, TypeAlias, TypeGuard

import numpy as np

from pellucid.core.capture import CaptureParams
from pellucid.core.config import SchedulerConfig
from pellucid.core.errors import ContextLengthError, InvalidRequestError
from pellucid.core.pooling_params import PoolingParams
from pellucid.core.sampling_params import SamplingParams
from pellucid.core.sequence import SequenceGroup
from pellucid.core.validation import check_integer, shown
from pellucid.decoding.grammar import Grammar
from pellucid.decoding.grammar_compiler import GrammarCompiler
from pellucid.engine.capture import check_capture
from pellucid.engine.layer_contrast import contrasted_layers
from pellucid.engine.search.base import GroupSearch, TokenSearch
from pellucid.engine.search.opening import begin_search, check_search, search_of
from pellucid.engine.sequence_breakers import SequenceBreakers
from pellucid.kvcache.cache_manager import CacheManager
from pellucid.models.spec import ModelSpec
from pellucid.tokenizer.tokenizer import Tokenizer

Message: TypeAlias = dict[str, Any]
PromptLike: TypeAlias = str | list[int]
RequestParams: TypeAlias = SamplingParams | PoolingParams

MAX_SALT_CHARACTERS = 1024

_NOTHING_SAMPLED = SamplingParams(temperature=0, seed=0)


@dataclass(frozen=True, slots=True)
class Prompt:
    """A prompt that was checked.

    Attributes:
        text: None where token ids were given.
        negative_token_ids: those of the negative prompt; None where there is none.
        grammar: what its answer follows; None for anything, or if it is yet to be compiled.
    """

    text: str | None
    token_ids: list[int]
    negative_token_ids: list[int] | None = None
    grammar: Grammar | None = None


class RequestIntake:
    """Checks requests and makes sequence groups of them. Holds nothing of any.

    Attributes:
        grammars: compiles what answers are to follow.
    """

    def __init__(
        self, spec: ModelSpec, tokenizer: Tokenizer, config: SchedulerConfig, *, max_model_len: int, seed: int | None
    ) -> None:
        """
        Args:
            max_model_len: most tokens of a prompt and its continuation together.
            seed: from which requests without a seed draw theirs; None takes the operating system's entropy.
        """
        self.grammars = GrammarCompiler(tokenizer)
        self._spec = spec
        self._tokenizer = tokenizer
        self._config = config
        self._max_model_len = max_model_len
        self._seed = seed
        self._eos_token_ids = frozenset(tokenizer.eos_token_ids)
        self._breakers = SequenceBreakers(tokenizer, spec.vocab_size)

    def prepare(self, prompt: PromptLike | ListLike[Message], params: RequestParams | None = None) -> Prompt:
        """Turn a prompt (text, token ids, or messages with `role` and `content`) into token ids and check them, and the
        negative prompt of `params` if there is one; from any thread.

        Raises:
            InvalidRequestError: it is empty, of the wrong type, or has a token id out of the vocabulary; the model has
                no chat template, or it refuses the messages.
            ContextLengthError: it leaves no room for a token, or does not fit where none is to come.
        """
        if isinstance(params, SamplingParams) and params.negative_prompt is not None:
            return replace(self.prepare(prompt), negative_token_ids=self._negative_token_ids(params.negative_prompt))
        is_continued = not isinstance(params, PoolingParams)
        max_tokens = self._max_model_len - is_continued
        if isinstance(prompt, str):
            if not prompt:
                raise InvalidRequestError("the prompt is empty: give at least one character", param="prompt")
            checked = Prompt(prompt, self._tokenizer.encode(prompt, max_tokens=max_tokens))
        elif is_conversation(prompt):
            token_ids = self._tokenizer.apply_chat_template(prompt, max_tokens=max_tokens)
            checked = Prompt(None, token_ids)
        else:
            checked = Prompt(None, checked_token_ids(prompt, self._spec.vocab_size))
        num_tokens = len(checked.token_ids)
        if num_tokens == 0:
            raise InvalidRequestError("the prompt is empty: give at least one token", param="prompt")
        if num_tokens > max_tokens:
            more = " and needs room for one more" if is_continued else ""
            raise ContextLengthError(
                f"the prompt has {num_tokens} tokens{more}, "
                f"but the context holds {self._max_model_len} tokens (max_model_len)",
                param="prompt",
            )
        return checked

    def with_grammar(self, prompt: Prompt, params: RequestParams) -> Prompt:
        """`prompt` with the grammar that its answer follows, if `params` ask for one; waits while it is
        compiled. From any thread.

        Raises:
            InvalidRequestError: it is malformed, cannot be fulfilled or is too large.
            QueueFullError: too many grammars are being compiled.
        """
        if isinstance(params, PoolingParams) or params.structured_outputs is None or prompt.grammar is not None:
            return prompt
        return replace(prompt, grammar=self.grammars.compile(params.structured_outputs))

    def check_params(
        self, sampling_params: RequestParams, capture: CaptureParams | None = None, *, stream: bool = False
    ) -> None:
        """Check what only the engine and the model can tell of the parameters of a request that generates.

        Raises:
            InvalidRequestError: more continuations or beams than run at once, a token id out of the vocabulary, a
                capture of layers or heads that the model does not have, or one of several continuations; or a stream of
                which only the end tells what is to be returned.
        """
        if not isinstance(sampling_params, SamplingParams):
            raise InvalidRequestError("sampling_params must be a SamplingParams", param="sampling_params")
        if sampling_params.num_sequences > self._config.max_num_seqs:
            name = "n" if sampling_params.best_of is None else "best_of"
            raise InvalidRequestError(
                f"{name} is {sampling_params.num_sequences}, but at most {self._config.max_num_seqs} sequences run "
                "(max_num_seqs)",
                param=name,
            )
        if stream and sampling_params.num_sequences > sampling_params.n:
            raise InvalidRequestError(
                f"best_of is {sampling_params.best_of}, and only when all have ended is it known which "
                f"{sampling_params.n} to return: ask for the whole answer, not for a stream",
                param="best_of",
            )
        check_search(sampling_params, self._config.max_num_seqs, is_captured=capture is not None)
        vocab_size = self._spec.vocab_size
        for name, token_ids in (
            ("stop_token_ids", sampling_params.stop_token_ids),
            ("allowed_token_ids", sampling_params.allowed_token_ids),
            ("banned_token_ids", sampling_params.banned_token_ids),
            ("logit_bias", dict(sampling_params.logit_bias or ())),
        ):
            if token_ids and (largest := max(token_ids)) >= vocab_size:
                raise InvalidRequestError(
                    f"{name} has {largest}, but the vocabulary has ids 0 to {vocab_size - 1}", param=name
                )
        if sampling_params.dola_layers is not None:
            contrasted_layers(sampling_params, self._spec)
        if capture is not None:
            check_capture(capture, sampling_params, self._spec)

    def check_pooling(self, params: PoolingParams) -> None:
        """Check what only the model can tell of the parameters of a request that generates nothing.

        Raises:
            InvalidRequestError: a label that is not in the vocabulary.
        """
        vocab_size = self._spec.vocab_size
        for token_id in params.label_token_ids:
            if token_id >= vocab_size:
                raise InvalidRequestError(
                    f"label_token_ids has {token_id}, but the vocabulary has ids 0 to {vocab_size - 1}",
                    param="label_token_ids",
                )

    def check_options(self, priority: int, cache_salt: str) -> None:
        """Check what else a request may come with.

        Raises:
            InvalidRequestError: `priority` or `cache_salt` is of the wrong type or out of range.
        """
        check_integer("priority", priority, -(2**31), 2**31 - 1)
        if not isinstance(cache_salt, str) or len(cache_salt) > MAX_SALT_CHARACTERS:
            raise InvalidRequestError(
                f"cache_salt must be a string of up to {MAX_SALT_CHARACTERS} characters", param="cache_salt"
            )

    def make_group(
        self,
        request_id: str,
        prompt: Prompt,
        params: RequestParams,
        *,
        priority: int,
        cache_salt: str,
        stream: bool,
        arrival_number: int,
        arrival_time: float,
        cache: CacheManager,
    ) -> tuple[SequenceGroup, GroupSearch | TokenSearch | None]:
        """The request as the engine carries it, and the search that decides on its tokens; None for sampling, and
        where none is to be chosen.

        Raises:
            InvalidRequestError: something is wrong with a negative prompt that was not prepared.
            CapacityError: what it searches with may take more KV blocks than `cache` has.
        """
        pooling_params = params if isinstance(params, PoolingParams) else None
        sampling_params = params if isinstance(params, SamplingParams) else _NOTHING_SAMPLED
        if prompt.negative_token_ids is None and sampling_params.negative_prompt is not None:
            prompt = replace(prompt, negative_token_ids=self._negative_token_ids(sampling_params.negative_prompt))
        search = search_of(
            sampling_params,
            self._spec,
            self._tokenizer,
            max_tokens=self._max_model_len - len(prompt.token_ids),
            eos_token_ids=self._eos_token_ids,
        )
        group = SequenceGroup(
            request_id,
            prompt.token_ids,
            sampling_params,
            max_model_len=self._max_model_len,
            seed=self._request_seed(sampling_params, arrival_number),
            arrival_number=arrival_number,
            arrival_time=arrival_time,
            eos_token_ids=self._eos_token_ids,
            prompt=prompt.text,
            priority=int(priority),
            cache_salt=cache_salt.encode("utf-8", "surrogatepass"),
            stream=stream,
            num_lockstep=None if search is None else search.num_sequences,
            pooling_params=pooling_params,
        )
        if sampling_params.dry_multiplier:
            group.dry_breakers = self._breakers.token_ids(sampling_params.dry_sequence_breakers)  # type: ignore[arg-type]
        if search is not None:
            begin_search(
                group, search, prompt.negative_token_ids, cache, self._config, max_model_len=self._max_model_len
            )
        return group, search

    def _negative_token_ids(self, negative_prompt: str | Iterable[int]) -> list[int]:
        text_or_ids = negative_prompt if isinstance(negative_prompt, str) else list(negative_prompt)
        try:
            return self.prepare(text_or_ids).token_ids
        except InvalidRequestError as error:
            raise type(error)(f"negative_prompt: {error.message}", param="negative_prompt") from None

    def _request_seed(self, sampling_params: SamplingParams, arrival_number: int) -> int:
        if sampling_params.seed is not None:
            return sampling_params.seed
        if self._seed is None:
            return int.from_bytes(os.urandom(8), "little")
        from hashlib import sha256  # loads OpenSSL: see kvcache/prefix_cache.py

        numbers = self._seed.to_bytes(8, "little") + arrival_number.to_bytes(8, "little")
        return int.from_bytes(sha256(b"pellucid request seed\0" + numbers).digest()[:8], "little")


def is_conversation(prompt: object) -> TypeGuard[ListLike[Message]]:
    """Whether a prompt is a list of messages."""
    return isinstance(prompt, (list, tuple)) and bool(prompt) and isinstance(prompt[0], Mapping)


def checked_token_ids(token_ids: object, vocab_size: int) -> list[int]:
    """`token_ids` as a list of ints in the vocabulary.

    Raises:
        InvalidRequestError: it is something else.
    """
    if isinstance(token_ids, np.ndarray):
        token_ids = token_ids.tolist()
    if not isinstance(token_ids, (list, tuple)):
        raise InvalidRequestError(
            f"a prompt must be text or a list of token ids, not {type(token_ids).__name__}", param="prompt"
        )
    checked = [int(token_id) if isinstance(token_id, np.integer) else token_id for token_id in token_ids]
    for token_id in checked:
        if type(token_id) is not int:
            raise InvalidRequestError(f"a token id must be an integer, not {shown(token_id)}", param="prompt")
        if not 0 <= token_id < vocab_size:
            raise InvalidRequestError(
                f"token id {shown(token_id)} is not in the vocabulary, which has ids 0 to {vocab_size - 1}",
                param="prompt",
            )
    return checked
