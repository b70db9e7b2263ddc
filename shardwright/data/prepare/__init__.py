"""prepare: text in any form becomes cleaned, deduplicated token shards with an index and one manifest.

from shardwright.data.prepare import PrepareConfig, prepare
prepare(PrepareConfig(input=["bundled:english"], output="data/english"))
"""

from shardwright.data.prepare.options import PrepareConfig
from shardwright.data.prepare.pipeline import prepare

__all__ = ["PrepareConfig", "prepare"]
