"""From how to guess ahead to whoever guesses."""

from __future__ import annotations

from pellucid.core.config import SpeculativeConfig
from pellucid.core.errors import InvalidRequestError
from pellucid.engine.speculative.drafter import Drafter


def load_drafter(config: SpeculativeConfig) -> Drafter:
    """Whoever guesses as `config` says; whoever asked for it closes it.

    Raises:
        InvalidRequestError: the method is not supported yet.
    """
    if config.method == "ngram":
        from pellucid.engine.speculative.ngram import NgramDrafter

        assert config.prompt_lookup_min is not None
        assert config.prompt_lookup_max is not None
        return NgramDrafter(config.prompt_lookup_min, config.prompt_lookup_max)
    if config.method == "lookahead":
        from pellucid.engine.speculative.lookahead import LookaheadDrafter

        assert config.lookahead_ngram is not None
        assert config.lookahead_window is not None
        return LookaheadDrafter(config.lookahead_ngram, config.lookahead_window)
    raise InvalidRequestError(f"speculative method '{config.method}' is not supported yet", param="speculative")
