"""Groups the members of a tar shard into examples, and finds their images and labels."""

import array
import io
import json
import re

import numpy as np

from vit_jax.data.readers import formats
from vit_jax.errors import UserError
from vit_jax.io.text import brief


class Grouping:
    """Collects the members of a shard; those of a key are consecutive and make an example.

    `image` and `label` are as in `tars.Tars`.
    """

    def __init__(self, file: str, image: str, label: str | None):
        self.file, self.image, self.wanted = file, image, label
        self.key, self.group = None, {}
        self.offsets, self.sizes, self.key_sizes, self.counts = (array.array('q') for _ in range(4))
        self.member_offsets, self.member_sizes = array.array('q'), array.array('q')
        self.member_counts, self.member_kinds, self.kinds = array.array('q'), array.array('i'), {}
        self.labels, self.keys, self.many = array.array('i'), io.BytesIO(), False

    def add(self, key: str, kind: str, offset: int, size: int, text: bytes | None) -> None:
        """Adds a member; `text` is its content where that may have a label."""
        if key != self.key:
            self.flush()
            self.key = key
        if kind in self.group:
            raise self.error(f'two members have the extension .{brief(kind)}')
        self.group[kind] = offset, size, text

    def error(self, text: str) -> UserError:
        """An error that names shard and example."""
        return UserError(f'{self.file}: example {len(self.offsets)} ({brief(self.key)}): {text}')

    def flush(self) -> None:
        """Makes an example of the current group."""
        if self.key is None:
            return
        kinds = [k for k in self.group if k in formats.SUFFIXES]
        kinds = kinds if self.image == 'image' else [k for k in self.group if k == self.image]
        if len(kinds) != 1:
            found = ', '.join(f'.{brief(k)}' for k in self.group)
            known = ', '.join(formats.SUFFIXES)
            what = 'several images; choose one' if kinds else f'no image ({known})'
            raise self.error(f'{what} among its members {found}')
        labels = [] if self.wanted is None else self.label()
        if isinstance(labels, int):
            labels = [labels]
        elif self.wanted is not None:
            self.many = True
        offset, size, _ = self.group.pop(kinds[0])
        self.offsets.append(offset)
        self.sizes.append(size)
        self.labels.extend(labels)
        self.counts.append(len(labels))
        self.key_sizes.append(self.keys.write(self.key.encode('utf-8', 'surrogateescape')))
        self.member_counts.append(len(self.group))
        for kind, (offset, size, _) in self.group.items():
            self.member_offsets.append(offset)
            self.member_sizes.append(size)
            self.member_kinds.append(self.kinds.setdefault(kind, len(self.kinds)))
        self.group = {}

    def label(self) -> int | list[int]:
        """Label of the group, one or several, in the range of int32."""
        if 'cls' in self.group and self.wanted in ('label', 'cls'):
            text = self.group['cls'][2]
            if not re.fullmatch(rb'\s*-?\d{1,10}\s*', text):
                raise self.error(f'.cls is {brief(ascii(text))}, not a number')
            value = int(text)
        elif 'json' in self.group:
            value = self.json_label()
        else:
            raise self.error('no label: neither .cls nor .json; source.label=None reads none')
        for one in value if isinstance(value, list) else [value]:
            if type(one) is not int or not -(2**31) <= one < 2**31:
                raise self.error(f'label {brief(ascii(one))} is not the number of a class')
        return value

    def json_label(self) -> object:
        """Value of the label's field in the .json of the group."""
        try:
            value = json.loads(self.group['json'][2])
        except (ValueError, RecursionError) as e:
            raise self.error(f'.json is invalid ({brief(e)})') from e
        if not isinstance(value, dict) or self.wanted not in value:
            has = f'but {", ".join(value)}' if isinstance(value, dict) else 'as it is not an object'
            raise self.error(f'.json has no field {self.wanted!r}, {brief(has)}')
        return value[self.wanted]

    def arrays(self) -> dict[str, np.ndarray]:
        """The index: arrays by name, for n examples with m members other than the image.

        offsets, sizes int64 [n] of the images; keys uint8 (concatenated), key_sizes int64 [n];
        labels int32, label_counts int64 [n]; many: bool, whether labels are lists; member_counts
        int64 [n]; member_offsets, member_sizes int64 [m]; member_kinds int32 [m], indices among
        kinds, extensions joined by newlines, uint8.
        """
        self.flush()
        kinds = '\n'.join(kind.replace('\n', ' ') for kind in self.kinds)
        return {
            'offsets': np.array(self.offsets, np.int64),
            'sizes': np.array(self.sizes, np.int64),
            'keys': np.frombuffer(self.keys.getvalue(), np.uint8),
            'key_sizes': np.array(self.key_sizes, np.int64),
            'labels': np.array(self.labels, np.int32),
            'label_counts': np.array(self.counts, np.int64),
            'many': np.array(self.many),
            'member_counts': np.array(self.member_counts, np.int64),
            'member_offsets': np.array(self.member_offsets, np.int64),
            'member_sizes': np.array(self.member_sizes, np.int64),
            'member_kinds': np.array(self.member_kinds, np.int32),
            'kinds': np.frombuffer(kinds.encode('utf-8', 'surrogateescape'), np.uint8),
        }
