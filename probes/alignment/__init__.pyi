"""Public names of `probes.alignment`, with the module that defines each."""

from .comparison import compare
from .gap import modality_gap
from .integration_rate import IntegrationRate, MirVariant, frechet_distance, mir, mir_of
from .kernels import cka, cknna, hsic_biased, hsic_unbiased
from .layer_scores import LayerAlignment
from .layers import measure_layers
from .measures import Measure, Settings, measures
from .modality_transfer import ModalityTransfer, transfer_modalities
from .neighbors import mutual_knn, neighbor_overlap
from .pairing import ImageRows
from .retrieval_ranks import RetrievalRanks, recall_at, retrieval
from .row_cosine import cosine, row_cosines

__all__ = [
    "ImageRows",
    "IntegrationRate",
    "LayerAlignment",
    "Measure",
    "MirVariant",
    "ModalityTransfer",
    "RetrievalRanks",
    "Settings",
    "cka",
    "cknna",
    "compare",
    "cosine",
    "frechet_distance",
    "hsic_biased",
    "hsic_unbiased",
    "measure_layers",
    "measures",
    "mir",
    "mir_of",
    "modality_gap",
    "mutual_knn",
    "neighbor_overlap",
    "recall_at",
    "retrieval",
    "row_cosines",
    "transfer_modalities",
]
