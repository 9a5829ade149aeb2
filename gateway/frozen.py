"""A dataclass that nobody can change, for records that are made several times for each message.

`dataclass(frozen=True)` sets each field by a call of object.__setattr__: with eight fields five times the cost of a
class that may be changed (docs/performance.md). Here an object is filled while it is of a twin class with the same
slots, and becomes frozen when it is complete.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, TypeVar, dataclass_transform

T = TypeVar("T")


@dataclass_transform(frozen_default=True, field_specifiers=(field,))
def frozen(cls: type[T]) -> type[T]:
    """As `dataclass(frozen=True, slots=True)`, for classes without bases."""
    body = {name: value for name, value in vars(cls).items() if name not in ("__dict__", "__weakref__")}
    twin: type[T] = dataclass(slots=True)(type(cls.__name__, (), body))
    made: type[T] = dataclass(frozen=True, slots=True, init=False)(cls)

    def new(cls: type[T], *args: Any, **kwargs: Any) -> T:
        if not args and not kwargs:  # copy and pickle: the fields come by __setstate__
            return object.__new__(cls)
        record = twin(*args, **kwargs)
        record.__class__ = cls
        return record

    made.__new__ = new  # type: ignore[assignment]  # typed as a method, and it is static
    return made
