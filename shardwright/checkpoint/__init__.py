"""Checkpoints: logical tensors in safetensors files, everything else in JSON, each byte under a checksum.

    integrity.py   checksums, manifests, what "damaged" means     ranks.py  what several processes agree on
    folder.py      names, newest, latest, what to keep            plan.py   which rank writes what
    save.py        write one checkpoint                           load.py   read one, under any layout
    background.py  write while training goes on                   stream.py one tensor at a time, either way

Stands above config and log; nothing of model, data or training is known here. Built on torch.distributed.checkpoint
with its safetensors storage; no pickle is ever read.
"""

from shardwright.checkpoint.background import CheckpointWriter
from shardwright.checkpoint.folder import agree_on_newest, discard_newer, find_newest, read_latest, step_name
from shardwright.checkpoint.integrity import CheckpointError, DamagedError, Manifest, SaveError, damage, read_manifest
from shardwright.checkpoint.load import load
from shardwright.checkpoint.save import save
from shardwright.checkpoint.stream import StoredTensors, save_streamed

__all__ = [
    "CheckpointError",
    "CheckpointWriter",
    "DamagedError",
    "Manifest",
    "SaveError",
    "StoredTensors",
    "agree_on_newest",
    "damage",
    "discard_newer",
    "find_newest",
    "load",
    "read_latest",
    "read_manifest",
    "save",
    "save_streamed",
    "step_name",
]
