"""Public names of `activation_store`, with the module that defines each."""

from .direction import ConceptDirection
from .format.ragged import Ragged
from .format.schema import ArrayInfo, Schema
from .mention_rows import MentionRows
from .merging import merge, repack
from .reading.integrity import IntegrityReport, verify
from .reading.store import ActivationStore
from .source import ActivationSource, MemorySource
from .tracing.reductions import LensLogProbability, LensRank, Margin, Reduction, reductions
from .tracing.tracer import trace
from .writing.writer import StoreWriter

__all__ = [
    "ActivationSource",
    "ActivationStore",
    "ArrayInfo",
    "ConceptDirection",
    "IntegrityReport",
    "LensLogProbability",
    "LensRank",
    "Margin",
    "MemorySource",
    "MentionRows",
    "Ragged",
    "Reduction",
    "Schema",
    "StoreWriter",
    "merge",
    "reductions",
    "repack",
    "trace",
    "verify",
]
