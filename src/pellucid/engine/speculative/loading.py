"""From how to guess ahead to whoever guesses."""

from __future__ import annotations

from pellucid.backends.base import Backend
from pellucid.core.config import EngineConfig
from pellucid.core.errors import InvalidRequestError
from pellucid.engine.speculative.drafter import Drafter
from pellucid.estimate.memory import KVCapacity
from pellucid.tokenizer.tokenizer import Tokenizer


def make_drafter(config: EngineConfig, backend: Backend, capacity: KVCapacity) -> Drafter | None:
    """Whoever guesses as `config` says, None where nobody does; whoever asked for it closes it.

    Each method is imported only where it is asked for.

    Args:
        backend: runs the model that guesses: with "draft_model" that one, loaded, else the engine's own.
        capacity: of its KV cache.

    Raises:
        InvalidRequestError: the model does not have the layers that are to guess.
    """
    speculative, scheduler = config.speculative, config.scheduler
    if speculative is None:
        return None
    if speculative.method == "ngram":
        from pellucid.engine.speculative.ngram import NgramDrafter

        assert speculative.prompt_lookup_min is not None
        assert speculative.prompt_lookup_max is not None
        return NgramDrafter(speculative.prompt_lookup_min, speculative.prompt_lookup_max)
    if speculative.method == "lookahead":
        from pellucid.engine.speculative.lookahead import LookaheadDrafter

        assert speculative.lookahead_ngram is not None
        assert speculative.lookahead_window is not None
        return LookaheadDrafter(speculative.lookahead_ngram, speculative.lookahead_window)
    if speculative.method == "layer_skip":
        from pellucid.engine.speculative.layer_skip import LayerSkipDrafter

        layers = None if speculative.layers is None else list(speculative.layers)
        return LayerSkipDrafter(
            backend, layers, max_num_seqs=scheduler.max_num_seqs, max_model_len=capacity.max_model_len
        )
    from pellucid.engine.speculative.draft_model import DraftModelDrafter

    return DraftModelDrafter(
        backend,
        num_blocks=capacity.num_blocks,
        max_num_seqs=scheduler.max_num_seqs,
        max_num_batched_tokens=scheduler.max_num_batched_tokens,
        max_model_len=capacity.max_model_len,
        enable_prefix_caching=config.cache.enable_prefix_caching,
    )


def check_same_vocabulary(tokenizer: Tokenizer, draft_tokenizer: Tokenizer) -> None:
    """Raises:
    InvalidRequestError: a token id does not stand for the same in both vocabularies.
    """
    token_id = tokenizer.first_difference(draft_tokenizer)
    if token_id is None:
        return
    size, draft_size = tokenizer.vocab_size, draft_tokenizer.vocab_size
    if token_id in (size, draft_size):
        difference = f"it has {draft_size} tokens and the model {size}"
    else:
        own, its = tokenizer.id_to_token(token_id), draft_tokenizer.id_to_token(token_id)
        difference = f"token {token_id} is {its!r} in it and {own!r} in the model"
    raise InvalidRequestError(
        f"the draft model must have the vocabulary of the model, but {difference}", param="draft_model"
    )
