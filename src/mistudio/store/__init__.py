"""Activation rows on disk: written bucket by bucket, read back in an exactly uniform order.

path/manifest.json                         what the store holds; written last, so that it means "complete"
path/statistics.safetensors                mean and second moment of every site, float64
path/layers.3.resid_post/00000.safetensors tensor "rows" [R, D] float32; one file a bucket
path/where/00000.safetensors               tensor "where" [R, 3] int32: token id, document, offset in the document
path/progress.json, statistics-N.safetensors, .lock   only while a collection is unfinished
"""

from mistudio.store.manifest import Manifest
from mistudio.store.reader import Feed, Position, Store
from mistudio.store.writer import StoreWriter

__all__ = ["Feed", "Manifest", "Position", "Store", "StoreWriter"]
