"""Data sets for training and evaluation, and the keyed noise and order in which training sees them.

``load("digits")`` and its like give a ``Dataset``; ``loader`` turns one of its splits into batches. The order of an epoch and all
dequantization noise are functions of (seed, epoch, sample) through the counter-based generator Philox (Salmon et al., "Parallel
random numbers: as easy as 1, 2, 3", 2011): a resumed run, any number of workers and any number of ranks see the same data.
"""

from .batches import Batch as Batch, KeyedLoader as KeyedLoader, batch_of as batch_of, loader as loader
from .noise import dequantize as dequantize
from .sources import SOURCES as SOURCES, Dataset as Dataset, Split as Split, load as load, source as source
