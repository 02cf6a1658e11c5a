"""A model, ready to answer: the class that most programs need."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sized
from collections.abc import Sequence as ListLike
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeGuard, Unpack

import numpy as np
from numpy.typing import NDArray

from pellucid.core.capture import CaptureParams
from pellucid.core.closing import Closing
from pellucid.core.config import EngineOptions, engine_config
from pellucid.core.errors import InvalidRequestError
from pellucid.core.outputs import EmbeddingOutput, LabelOutput, RequestOutput
from pellucid.core.pooling_params import Pooling, PoolingParams, labelling
from pellucid.core.sampling_params import SamplingParams
from pellucid.core.trace import TraceSink
from pellucid.engine.loaded_model import LoadedModel, with_engine_options
from pellucid.engine.offline import GenerateStream, OfflineRun, paired
from pellucid.engine.pooling import embedding_output, label_output
from pellucid.engine.progress import GenerateProgress
from pellucid.engine.request_intake import Message, Prompt, PromptLike, RequestParams, is_conversation
from pellucid.engine.shared_engine import Inbox, SharedEngine
from pellucid.engine.token_stream import TokenStream

if TYPE_CHECKING:
    from pellucid.engine.prefix_store import PrefixStore
    from pellucid.weights.cache import Progress


class LLM(LoadedModel, Closing):
    """One model, loaded. A context manager; safe to use from several threads, whose requests then share the batch, and
    in a forked child, which shares the weights and has the requests, KV cache and threads to itself from then on.

    Attributes: those of LoadedModel, and
        shared_engine: what takes requests of several threads.
    """

    @with_engine_options
    def __init__(
        self,
        model: str | Path,
        *,
        progress: Progress | None = None,
        trace: TraceSink | None = None,
        **options: Unpack[EngineOptions],
    ) -> None:
        """Find, fetch where needed, and load a model.

        Args:
            model: a catalog name, the path of a GGUF file, or `hf:org/repo[:file]`.
            threads: threads that compute; None lets the backend choose.
            max_model_len: most tokens of a prompt and its continuation together; None takes the model's own limit, or
                what the KV cache holds where that is less.
            seed: from which requests without a seed draw theirs, by order of arrival; None takes the operating system's
                entropy.
            backend: "cpu" (the native core), "reference" (numpy, slow), or "auto": the native core where installed.
            kv_cache_dtype: how keys and values are stored: "f16", "bf16", "f32" or "q8" (docs/kernels.md).
            max_num_seqs: most sequences in one step.
            max_num_batched_tokens: most tokens in one step; a longer prefill is cut into chunks.
            kv_cache_memory: bytes for the KV cache; None takes up to half of the memory that is free once the weights
                are loaded. It is taken from the system only as it fills.
            enable_prefix_caching: let prompts that begin alike share what was computed.
            speculative: guess tokens ahead, to compute several in a step: "ngram", "lookahead", "layer_skip", or a
                SpeculativeConfig (docs/speculation.md). It changes no answer, only how long it takes. None does not.
            progress: called while the model is fetched.
            trace: told of every step and request.

        Raises:
            InvalidRequestError: an argument is out of range; `param` names it.
            ModelNotFoundError, DownloadError, IntegrityError, StorageError: the model cannot be had.
            ModelFileError, UnsupportedModelError: it cannot be used.
            CapacityError: it does not fit in memory, or `max_model_len` not in the KV cache.
            BackendError: the backend is not available on this machine.
        """
        super().__init__(engine_config(str(model), options), progress, trace)
        self._model_file = Path(self.model_path).absolute(), self._loaded.model_status
        self.shared_engine = SharedEngine(self._engine, self._loaded.close)

    @cached_property
    def _prefix_store(self) -> PrefixStore:
        from pellucid.engine.prefix_store import PrefixStore  # loads OpenSSL: see kvcache/prefix_cache.py

        return PrefixStore(self._engine, self.backend, *self._model_file)

    def generate(
        self,
        prompts: PromptLike | ListLike[PromptLike],
        sampling_params: SamplingParams | ListLike[SamplingParams] | None = None,
        *,
        capture: CaptureParams | None = None,
        progress: bool = False,
    ) -> list[RequestOutput]:
        """Continue prompts, many at once.

        Args:
            prompts: text, or a list of token ids, or a list of these.
            sampling_params: one for all, or one for each prompt; None is SamplingParams().
            capture: what each asks to see of the model at work; None for nothing.
            progress: show a progress bar on standard error.

        Returns:
            One output a prompt, in order.

        Raises:
            InvalidRequestError: a prompt or a parameter is not valid; nothing was computed.
            ContextLengthError: a prompt leaves no room for a token; nothing was computed.
            CapacityError: what is to be captured may take more memory than there is.
            BackendError: computing one of them failed; the others were aborted.
        """
        prompt_list = [prompts] if _is_one_prompt(prompts) else list(prompts)
        return self._generate_all(prompt_list, sampling_params, progress, capture)  # type: ignore[arg-type]

    def generate_iter(
        self,
        prompts: Iterable[PromptLike],
        sampling_params: SamplingParams | Iterable[SamplingParams] | None = None,
        *,
        capture: CaptureParams | None = None,
        total: int | None = None,
        progress: bool = False,
    ) -> GenerateStream:
        """Continue prompts from any iterable, however many, in bounded memory.

        Prompts are read ahead only as far as keeps the engine busy: at most 8 x `max_num_seqs` beyond the outputs given
        back. Closing the iterator, or letting go of it, aborts what runs.

        Args:
            prompts: text or lists of token ids; a generator may make them as they are taken.
            sampling_params: one for all, or an iterable of one for each prompt; None is SamplingParams().
            capture: what each asks to see of the model at work; None for nothing.
            total: how many prompts there are, for the progress bar; None asks `prompts`, if it knows.
            progress: show a progress bar on standard error.

        Yields:
            One output a prompt, in order. A prompt that is refused or fails has `error` in its output and
            "error" for `finish_reason`; the others go on.

        Raises:
            InvalidRequestError: at once, if `prompts` is one prompt or no iterable, or `sampling_params` is not valid;
                from the iterator, if the sampling_params end before the prompts do or after them.
            BackendError: from the iterator, once the LLM is closed.
        """
        if not isinstance(prompts, Iterable) or (_is_list_like(prompts) and _is_one_prompt(prompts)):
            raise InvalidRequestError("prompts must be an iterable of prompts, and not one prompt", param="prompts")
        if total is None and isinstance(prompts, Sized):
            total = len(prompts)
        if sampling_params is None or isinstance(sampling_params, SamplingParams):
            sampling_params = sampling_params or SamplingParams()
            self._engine.intake.check_params(sampling_params, capture)
        elif not isinstance(sampling_params, Iterable):
            raise InvalidRequestError(
                "sampling_params must be a SamplingParams or an iterable of them", param="sampling_params"
            )
        requests = paired(prompts, sampling_params)
        return GenerateStream(self.shared_engine, requests, GenerateProgress(total, progress), capture)

    def chat(
        self,
        messages: ListLike[Message] | ListLike[ListLike[Message]],
        sampling_params: SamplingParams | ListLike[SamplingParams] | None = None,
        *,
        capture: CaptureParams | None = None,
        progress: bool = False,
    ) -> list[RequestOutput]:
        """Answer conversations, many at once, through the model's chat template.

        Args:
            messages: mappings with `role` and `content`, or a list of such conversations.
            sampling_params, capture, progress: as in `generate`.

        Returns:
            One output a conversation, in order.

        Raises:
            InvalidRequestError: also where the model has no chat template or it refuses the messages.
            As `generate`.
        """
        conversations = [messages] if is_conversation(messages) else list(messages)
        prompts: list[PromptLike] = [self.tokenizer.apply_chat_template(conversation) for conversation in conversations]  # type: ignore[arg-type]
        return self._generate_all(prompts, sampling_params, progress, capture)

    def embed(
        self,
        prompts: PromptLike | ListLike[PromptLike],
        *,
        pooling: Pooling = "mean",
        normalize: bool = True,
        progress: bool = False,
    ) -> list[EmbeddingOutput]:
        """One vector for each prompt: its hidden states after the final norm, pooled. Nothing is generated.

        A mean reads every token, so the prefix cache spares it no work; the last token alone it does.

        Args:
            prompts: text, or a list of token ids, or a list of these.
            pooling: "mean" of all tokens, or the "last" one.
            normalize: scale to length 1, so that a dot product is the cosine.
            progress: show a progress bar on standard error.

        Returns:
            One output a prompt, in order.

        Raises:
            InvalidRequestError: a prompt or a parameter is not valid; nothing was computed.
            ContextLengthError: a prompt does not fit in the context; nothing was computed.
            BackendError: computing one of them failed; the others were aborted.
            EngineClosedError: the LLM was closed meanwhile.
        """
        return [embedding_output(reply) for reply in self._pool(prompts, PoolingParams(pooling, normalize), progress)]

    def label_logprobs(
        self, prompts: PromptLike | ListLike[PromptLike], label_token_ids: Iterable[int], *, progress: bool = False
    ) -> list[LabelOutput]:
        """How probable tokens are to come after each prompt, as classifiers and rerankers ask it: the bits that
        `generate` would tell of them. Nothing is generated.

        Args:
            prompts: text, or a list of token ids, or a list of these.
            label_token_ids: 1 to 128 tokens, the same for all prompts.
            progress: show a progress bar on standard error.

        Returns:
            One output a prompt, in order.

        Raises:
            As `embed`.
        """
        params = labelling(label_token_ids)
        self._engine.intake.check_pooling(params)
        return [label_output(reply) for reply in self._pool(prompts, params, progress)]

    def stream(
        self,
        prompt: PromptLike | ListLike[Message],
        sampling_params: SamplingParams | None = None,
        *,
        capture: CaptureParams | None = None,
    ) -> TokenStream:
        """Continue one prompt or answer one conversation, token by token. Closing the iterator aborts the request.

        Args:
            prompt: text, token ids, or messages with `role` and `content`.
            sampling_params: None is SamplingParams().
            capture: what it asks to see of the model at work; None for nothing.

        Yields:
            One TokenOutput a token; the last one has `request_output`, the whole answer.

        Raises:
            InvalidRequestError, ContextLengthError, CapacityError: at once, before the first token is asked for.
            BackendError: from the iterator, if computing fails.
        """
        params = sampling_params or SamplingParams()
        self._engine.intake.check_params(params, capture)
        prepared = self._engine.intake.with_grammar(self._engine.intake.prepare(prompt, params), params)
        inbox = Inbox()
        with self.shared_engine.exclusive():
            request_id = self.shared_engine.add(prepared, params, inbox, stream=True, capture=capture)
        return TokenStream(self.shared_engine, request_id, inbox)

    def logits(self, token_ids: ListLike[int]) -> NDArray[np.float32]:
        """What the model expects after each token: float32 [len(token_ids), vocab_size], for evaluation.

        Raises:
            InvalidRequestError: no token, or a token id out of the vocabulary.
            ContextLengthError: more tokens than the context holds.
            CapacityError: the result does not fit in memory.
            BackendError: the backend failed.
        """
        with self.shared_engine.exclusive():
            return self._engine.alone.logits(token_ids)  # type: ignore[arg-type]

    def save_prefix(
        self, prefix: PromptLike | ListLike[Message], path: str | os.PathLike[str], *, include_kv: bool = True
    ) -> int:
        """Save what prompts begin with, so that a later process need not compute it: after `load_prefix`, a prompt that
        begins so is answered as after any other prefix hit, with the same bits.

        Keys and values that are not cached yet are computed, in the gaps between the steps of other requests.

        Args:
            prefix: text, token ids, or messages with `role` and `content`, which the file then holds too.
            path: the file, which only its owner can read. One that is there is replaced, whole or not at all.
            include_kv: False leaves keys and values out: the file is small, and they are computed again.

        Returns:
            Tokens whose keys and values the file holds: as many as fill blocks of 64.

        Raises:
            InvalidRequestError, ContextLengthError: as `generate`; or prefix caching is off.
            StorageError: the file cannot be written.
            ModelFileError: the model file was changed since it was loaded.
            CapacityError, BackendError: computing the keys and values failed.
        """
        messages: list[Message] | None = None
        if is_conversation(prefix):
            messages = list(prefix)
            token_ids = self.tokenizer.apply_chat_template(messages, add_generation_prompt=False)
        else:
            token_ids = self._engine.intake.prepare(prefix).token_ids
        store = self._prefix_store
        saving = store.begin(token_ids, messages=messages, include_kv=include_kv)
        store.model_sha256()  # which may take a while: not while the engine waits
        while True:
            with self.shared_engine.exclusive():
                if store.advance(saving):
                    return store.write(saving, Path(path))

    def load_prefix(self, path: str | os.PathLike[str]) -> int:
        """Put the keys and values of a saved prefix into the prefix cache, where they stay until their room is needed.

        Args:
            path: a file that `save_prefix` wrote, with the same model file, backend and `kv_cache_dtype`. Whoever can
                change it can change the answers to prompts that begin so.

        Returns:
            Tokens whose keys and values the file holds.

        Raises:
            PrefixFileError: it is not a saved prefix, is damaged, or does not fit this model; nothing was loaded.
            ContextLengthError: the prefix leaves no room for a token in the context.
            CapacityError: too many KV blocks are in use.
            InvalidRequestError: prefix caching is off.
            ModelFileError: the model file was changed since it was loaded.
        """
        self._prefix_store.model_sha256()
        with self.shared_engine.exclusive():
            return self._prefix_store.load(Path(path))

    def reset_prefix_cache(self) -> None:
        """Forget every cached prefix, so that the next prompt is computed in full."""
        with self.shared_engine.exclusive():
            self._engine.scheduler.cache.reset_prefix_cache()

    def close(self) -> None:
        """Abort what runs and free weights, KV cache and threads. Further calls raise BackendError."""
        self.shared_engine.close()

    def _generate_all(
        self,
        prompts: list[PromptLike],
        sampling_params: SamplingParams | ListLike[SamplingParams] | None,
        progress: bool,
        capture: CaptureParams | None,
    ) -> list[RequestOutput]:
        params = _one_each(sampling_params, len(prompts))
        for distinct in {id(each): each for each in params}.values():
            self._engine.intake.check_params(distinct, capture)
            if distinct.structured_outputs is not None:
                self._engine.intake.grammars.compile(distinct.structured_outputs)
        return self._run_all(prompts, params, progress, capture)

    def _pool(
        self, prompts: PromptLike | ListLike[PromptLike], params: PoolingParams, progress: bool
    ) -> list[RequestOutput]:
        prompt_list: list[PromptLike] = [prompts] if _is_one_prompt(prompts) else list(prompts)  # type: ignore[list-item, arg-type]
        return self._run_all(prompt_list, [params] * len(prompt_list), progress)

    def _run_all(
        self,
        prompts: list[PromptLike],
        params: ListLike[RequestParams],
        progress: bool,
        capture: CaptureParams | None = None,
    ) -> list[RequestOutput]:
        """One reply a prompt, of `params` that were checked."""
        prepared = [
            self._prepare(prompt, each, index, len(prompts))
            for index, (prompt, each) in enumerate(zip(prompts, params, strict=True))
        ]
        replies: list[RequestOutput | None] = [None] * len(prompts)
        with (
            GenerateProgress(len(prompts), progress) as bar,
            OfflineRun(self.shared_engine, iter(zip(prepared, params, strict=True)), bar, capture) as run,
        ):
            for index, reply in run:
                if reply.error is not None:
                    raise reply.error
                replies[index] = reply
                bar.advance()
        return [reply for reply in replies if reply is not None]

    def _prepare(self, prompt: PromptLike, params: RequestParams, index: int, count: int) -> Prompt:
        try:
            return self._engine.intake.prepare(prompt, params)
        except InvalidRequestError as error:
            if count == 1:
                raise
            raise type(error)(f"prompt {index} of {count}: {error.message}", param=error.param) from None


def _is_list_like(prompts: object) -> TypeGuard[str | ListLike[Any] | NDArray[Any]]:
    return isinstance(prompts, (str, list, tuple, np.ndarray))


def _is_one_prompt(prompts: object) -> bool:
    if isinstance(prompts, str):
        return True
    if isinstance(prompts, np.ndarray):
        return prompts.ndim == 1
    if not _is_list_like(prompts):
        raise InvalidRequestError(
            f"prompts must be text, token ids, or a list of these, not {type(prompts).__name__}", param="prompts"
        )
    return bool(prompts) and isinstance(prompts[0], (int, np.integer))


def _one_each(sampling_params: SamplingParams | ListLike[SamplingParams] | None, count: int) -> list[SamplingParams]:
    if sampling_params is None:
        sampling_params = SamplingParams()
    if isinstance(sampling_params, SamplingParams):
        return [sampling_params] * count
    params = list(sampling_params)
    if len(params) != count:
        raise InvalidRequestError(
            f"there are {count} prompts and {len(params)} sampling_params: give one, or one for each prompt",
            param="sampling_params",
        )
    return params
