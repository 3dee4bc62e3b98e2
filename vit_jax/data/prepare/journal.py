"""The journal of an unfinished folder: its plan, then a line of JSON for each finished shard."""

import contextlib
import hashlib
import json
import os
import pathlib
from collections.abc import Mapping
from typing import Any

from vit_jax.data.prepare.plan import difference
from vit_jax.data.prepare.worker import Job
from vit_jax.data.readers import records
from vit_jax.errors import UserError
from vit_jax.io import storage


def resume(job: Job, plan: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Returns the entries of the finished shards, each verified against its file.

    Begins the journal of an empty folder. Raises UserError if the folder has other files, or was
    begun with another plan.
    """
    path = job.folder / records.JOURNAL
    if not path.exists():
        if any(p.name[0] != '.' for p in job.folder.iterdir()):
            raise UserError(f'{job.folder} has other files; name a new folder')
        storage.write(path, f'{json.dumps(plan)}\n'.encode(), sync=True)
        return []
    lines = []
    for line in path.read_text().splitlines():
        with contextlib.suppress(json.JSONDecodeError):  # cut off by a kill: written again
            lines.append(json.loads(line))
    changed = difference(lines[0] if lines and isinstance(lines[0], dict) else {}, plan)
    if changed:
        raise UserError(
            f'{job.folder} is unfinished and was begun with other options: {changed}; repeat '
            'those, or name a new folder'
        )
    entries = [
        entry for entry in lines[1:] if is_intact(job.path(entry['split'], entry['shard']), entry)
    ]
    text = ''.join(json.dumps(line) + '\n' for line in (plan, *entries))
    storage.write(path, text.encode(), sync=True)
    return entries


def is_intact(path: pathlib.Path, entry: Mapping[str, Any]) -> bool:
    """Whether a shard has the size and hash of its entry."""
    try:
        with path.open('rb') as file:
            if os.fstat(file.fileno()).st_size != entry['bytes']:
                return False
            return hashlib.file_digest(file, 'sha256').hexdigest() == entry['sha256']
    except OSError:
        return False
