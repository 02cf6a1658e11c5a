"""From the parameters of a request to its search, and to the lockstep group that it begins with."""

from __future__ import annotations

from pellucid.core.config import SchedulerConfig
from pellucid.core.errors import CapacityError, InvalidRequestError
from pellucid.core.sampling_params import SamplingParams
from pellucid.core.sequence import SequenceGroup
from pellucid.engine.search.base import GroupSearch, TokenSearch
from pellucid.engine.search.beam import BeamGroupSearch
from pellucid.engine.search.contrastive import ContrastiveSearch
from pellucid.engine.search.guided import GuidedSearch
from pellucid.kvcache.cache_manager import CacheManager
from pellucid.models.spec import ModelSpec
from pellucid.tokenizer.tokenizer import Tokenizer


def check_search(params: SamplingParams, max_num_seqs: int, *, is_captured: bool) -> None:
    """Check what the engine's limits say to the search that a request asks for, if it asks for one.

    Raises:
        InvalidRequestError: it takes more sequences than run at once, or is to be captured, which is of one.
    """
    if params.num_beams > max_num_seqs:
        raise InvalidRequestError(
            f"num_beams is {params.num_beams}, but at most {max_num_seqs} sequences run (max_num_seqs)",
            param="num_beams",
        )
    if params.penalty_alpha and params.top_k > max_num_seqs:
        raise InvalidRequestError(
            f"top_k is {params.top_k}, but of the candidates of contrastive search at most {max_num_seqs} are computed "
            "at once (max_num_seqs)",
            param="top_k",
        )
    if params.guidance_scale != 1 and max_num_seqs < 2:
        raise InvalidRequestError(
            "guidance_scale needs two sequences at once, but only one is computed (max_num_seqs)",
            param="guidance_scale",
        )
    for name, off in (("num_beams", 1), ("penalty_alpha", 0), ("guidance_scale", 1)):
        if is_captured and getattr(params, name) != off:
            raise InvalidRequestError(f"a capture is of one sequence, but {name} takes several", param="capture")


def search_of(
    params: SamplingParams, spec: ModelSpec, tokenizer: Tokenizer, *, max_tokens: int, eos_token_ids: frozenset[int]
) -> GroupSearch | TokenSearch | None:
    """The search that a request asks for; None for sampling.

    Args:
        max_tokens: most tokens that the context leaves room for.
    """
    if params.num_beams > 1:
        return BeamGroupSearch(
            params,
            tokenizer,
            max_length=min(max_tokens, params.max_tokens or max_tokens),
            eos_token_ids=frozenset() if params.ignore_eos else eos_token_ids,
        )
    if params.penalty_alpha:
        return ContrastiveSearch(params, spec.hidden_size)
    return GuidedSearch(params) if params.guidance_scale != 1 else None


def begin_search(
    group: SequenceGroup,
    search: GroupSearch | TokenSearch,
    negative_token_ids: list[int] | None,
    cache: CacheManager,
    config: SchedulerConfig,
    *,
    max_model_len: int,
) -> None:
    """Make a lockstep group ready to be queued.

    Args:
        negative_token_ids: what the second sequence of a guided group begins with; None for the prompt's last token.
            The request ends with the context of either.

    Raises:
        CapacityError: there are fewer KV blocks than it may hold at once.
    """
    if isinstance(search, GuidedSearch):
        token_ids = group.prompt_token_ids[-1:] if negative_token_ids is None else negative_token_ids
        conditional, unconditional = group.live = group.sequences[:2]
        unconditional.token_ids, unconditional.num_prompt_tokens = list(token_ids), len(token_ids)
        longer = len(token_ids) - conditional.num_prompt_tokens
        conditional.max_length = min(conditional.max_length, max_model_len - max(0, longer))
        unconditional.max_length = conditional.max_length + longer
    for sequence in group.sequences:
        sequence.max_length += search.num_ahead
    needed = cache.max_blocks_of_group(group, config.max_num_batched_tokens)
    if needed > cache.num_blocks:
        raise CapacityError(
            f"{len(group.sequences)} sequences of up to {group.live[0].max_length} tokens, which the request searches "
            f"with, take up to {needed} KV blocks, but there are {cache.num_blocks}: lower max_tokens or search with "
            "fewer",
            param="max_tokens",
        )
