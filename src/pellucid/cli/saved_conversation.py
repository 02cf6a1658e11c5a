"""The file of `pellucid chat --session`."""

from __future__ import annotations

import sys
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from pellucid.core.errors import (
    CapacityError,
    ContextLengthError,
    InvalidRequestError,
    PellucidError,
    PrefixFileError,
    StorageError,
)

if TYPE_CHECKING:
    from pellucid import LLM
    from pellucid.cli.session import Messages


class SavedConversation:
    """A conversation in a file, as `LLM.save_prefix` writes it.

    What was said is saved after every turn. Its keys and values, which may be large and can be computed again, follow
    when the conversation is left.

    Raises:
        StorageError: there is no folder to write the file to.
    """

    def __init__(self, path: str) -> None:
        self.path = Path(path)
        self._has_kv = True  # of the conversation as it is now
        if not self.path.parent.is_dir():
            raise StorageError(
                f"cannot keep a session in {path}: there is no folder {self.path.parent}", param="session"
            )

    def exists(self) -> bool:
        return self.path.exists()

    def restore(self, llm: LLM, opening: Messages) -> Messages:
        """The messages; keys and values go into the cache of `llm`, or are left to be computed again where they do not
        fit there, and standard error tells.

        Raises:
            PrefixFileError: it is no saved conversation, is damaged, or was held with another model.
            InvalidRequestError: `opening` is another than that of the conversation.
        """
        from pellucid.kvcache.saved_prefix import PrefixFile

        try:
            restored = f"{llm.load_prefix(self.path)} tokens from cache"
        except (CapacityError, ContextLengthError, PrefixFileError) as error:
            if isinstance(error, PrefixFileError) and error.param != "kv_layout":
                raise
            restored = f"to be read again: {error.message}"
        with PrefixFile.open(self.path) as file:
            messages = file.prefix.messages
        if not messages or not all(isinstance(message.get("content"), str) for message in messages):
            raise PrefixFileError(
                f"{self.path} is a saved prefix, but no conversation: give --session another file", param="session"
            )
        if opening and messages[0] != opening[0]:
            raise InvalidRequestError(
                f"the conversation in {self.path} does not begin with this system message: leave --system out, or give "
                "--session another file",
                param="system",
            )
        print(f"(restored {len(messages)} messages, {restored})", file=sys.stderr)
        return messages

    def keep(self, llm: LLM, messages: Messages) -> None:
        """Save what was said so far, which Ctrl-C does not cut short. Where it fails, standard error tells, and the
        conversation goes on."""
        from pellucid.engine.interrupts import DeferInterrupt

        self._has_kv = False
        try:
            with suppress(KeyboardInterrupt), DeferInterrupt():
                llm.save_prefix(messages, self.path, include_kv=False)
        except PellucidError as error:
            print(f"warning: this turn was not saved: {error.message}", file=sys.stderr)

    def forget(self) -> None:
        """A conversation without a turn has no file."""
        self._has_kv = True
        self.path.unlink(missing_ok=True)

    def leave(self, llm: LLM, messages: Messages) -> None:
        """Save the conversation with its keys and values, unless the file has them.

        Raises:
            StorageError: it cannot be written.
        """
        if self._has_kv:
            return
        try:
            llm.save_prefix(messages, self.path)
        except ContextLengthError:  # it has filled the context, so that it cannot go on anyway
            llm.save_prefix(messages, self.path, include_kv=False)
