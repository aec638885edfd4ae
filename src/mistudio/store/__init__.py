"""Activation rows on disk: written bucket by bucket, read back in an exactly uniform order.

path/manifest.json                         what the store holds; written last, so that it means "complete"
path/statistics.safetensors                mean and second moment of every site, float64
path/layers.3.resid_post/00000.safetensors tensor "rows" [R, D] in the store's row dtype; one file a bucket
path/layers.3.resid_post/00000.row_scale.safetensors   with int8 only: tensor "row_scale" [R, 1] float32
path/where/00000.safetensors               tensor "where" [R, 3] int32: token id, document, offset in the document
path/progress.json, statistics-N.safetensors, .lock   only while a collection is unfinished
path/copy.json                             only while a copy is unfinished (`transfer`)
"""

from mistudio.store.cache import Cache
from mistudio.store.copy import convert, merge, split
from mistudio.store.feed import Feed, FeedOptions, JointFeed, Position
from mistudio.store.manifest import Manifest
from mistudio.store.reader import Store
from mistudio.store.ring import RingFeed
from mistudio.store.transfer import copy_store
from mistudio.store.upkeep import remove, stores_in, summary, verify
from mistudio.store.writer import StoreWriter

__all__ = [
    "Cache",
    "Feed",
    "FeedOptions",
    "JointFeed",
    "Manifest",
    "Position",
    "RingFeed",
    "Store",
    "StoreWriter",
    "convert",
    "copy_store",
    "merge",
    "remove",
    "split",
    "stores_in",
    "summary",
    "verify",
]
