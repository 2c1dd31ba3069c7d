"""How one checkpoint layout's tensor names turn into another's, in both directions."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property


@dataclass(frozen=True)
class KeyTable:
    """Pairs of (module or tensor name in the original layout, name in the library's); what follows a name is kept.

    The library's names are those of the diffusers and transformers classes, without the `text_model.` level that
    transformers' CLIP had before version 5.6.
    """

    pairs: tuple[tuple[str, str], ...]

    @cached_property
    def _library_names(self) -> Mapping[str, str]:
        return dict(self.pairs)

    @cached_property
    def _original_names(self) -> Mapping[str, str]:
        return {library: original for original, library in self.pairs}

    def to_library(self, key: str) -> str | None:
        """Return the library's name of an original key, None where the table does not know it."""
        return _translate(key, self._library_names)

    def to_original(self, key: str) -> str | None:
        """Return the original name of a library key, None where the table does not know it."""
        return _translate(key, self._original_names)


def _translate(key: str, names: Mapping[str, str]) -> str | None:
    """Return key with its longest known leading part replaced, None if no leading part is known."""
    head = key
    while head:
        if head in names:
            return names[head] + key[len(head) :]
        head = head.rpartition(".")[0]
    return None


def beneath(original: str, library: str, pairs: tuple[tuple[str, str], ...]) -> tuple[tuple[str, str], ...]:
    """Return pairs with original and library put before their two names."""
    return tuple((f"{original}.{inner}", f"{library}.{outer}") for inner, outer in pairs)
