"""Text to tokens and back: vocabularies, chat templates, incremental detokenization."""

from pellucid.tokenizer.detokenizer import DetokenizerState, IncrementalDetokenizer
from pellucid.tokenizer.tokenizer import Tokenizer

__all__ = ["DetokenizerState", "IncrementalDetokenizer", "Tokenizer"]
