"""What the configurations of all methods share."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, Self


@dataclass(frozen=True)
class MethodConfig:
    """What the frozen configurations share: a plain-dict form that round-trips and refuses unknown keys."""

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON-ready values."""
        fields = dataclasses.asdict(self)
        return {name: list(value) if isinstance(value, tuple) else value for name, value in fields.items()}

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> Self:
        """The inverse of `to_dict`.

        Raises:
            ValueError: for a key that is no field of this configuration.
        """
        known = {field.name for field in dataclasses.fields(cls)}
        unknown = sorted(set(fields) - known)
        if unknown:
            raise ValueError(f"unknown {cls.__name__} fields {unknown}; expected some of {sorted(known)}")
        return cls(**{name: tuple(value) if isinstance(value, list) else value for name, value in fields.items()})

    @classmethod
    def from_saved(cls, fields: dict[str, Any]) -> Self:
        """What `from_dict` makes of the fields in a saved file, which an older version may have written."""
        return cls.from_dict(fields)

    def of_heads(self, start: int, stop: int) -> Self:
        """The configuration of only some of a layer's heads, where it says something for each head."""
        ratio = getattr(self, "keep_ratio", None)
        return self.replace(keep_ratio=ratio[start:stop]) if isinstance(ratio, tuple) else self

    def replace(self, **changes: Any) -> Self:
        """A copy with some fields changed, validated again."""
        return dataclasses.replace(self, **changes)
