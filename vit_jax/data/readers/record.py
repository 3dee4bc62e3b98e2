"""The raw fields of an example, as its reader finds them in the files."""

import json
from collections.abc import Iterator, Mapping
from typing import Any

from vit_jax.errors import UserError
from vit_jax.io.text import brief


class Record(Mapping):
    """Raw fields by name; one that is not in `fields` is read from its file at its first use.

    So a field that no task asks for costs nothing. Such fields are those that
    `records.field_names(index)` names and `records.read_field(index, name)` reads. A field that
    the example does not have is a UserError, which makes the example unusable.
    """

    __slots__ = ('fields', 'records', 'index')

    def __init__(self, fields: dict[str, Any], records: Any = None, index: int = 0):
        self.fields, self.records, self.index = fields, records, index

    def __getitem__(self, name: str) -> Any:
        if name not in self.fields:
            if name not in self.names():
                raise UserError(f'no field {brief(name)!r} among {brief(", ".join(self.names()))}')
            self.fields[name] = self.records.read_field(self.index, name)
        return self.fields[name]

    def names(self) -> list[str]:
        """Names of all fields."""
        others = [] if self.records is None else self.records.field_names(self.index)
        return [*self.fields, *(name for name in others if name not in self.fields)]

    def get(self, name: str, default: Any = None) -> Any:
        return self[name] if name in self else default

    def __contains__(self, name: object) -> bool:
        return name in self.fields or name in self.names()

    def __iter__(self) -> Iterator[str]:
        return iter(self.names())

    def __len__(self) -> int:
        return len(self.names())

    def __or__(self, other: Mapping[str, Any]) -> 'Record':
        """A record with other values of some fields."""
        return Record({**self.fields, **other}, self.records, self.index)


def field(record: Mapping[str, Any], path: str) -> Any:
    """A field of a record, or what a path leads to in one: 'objects/bbox', 'json/boxes'.

    Bytes that a path leads into are JSON. Raises UserError if there is no such field.
    """
    if '/' not in path or path in record:
        return record[path]
    name, *inner = path.split('/')
    value = record[name]
    for key in inner:
        try:
            value = json.loads(value) if isinstance(value, bytes | str) else value
            value = value[key]
        except (ValueError, RecursionError, TypeError, KeyError, IndexError) as e:
            raise UserError(f'field {brief(name)} has no {brief(path)}') from e
    return value
