"""From a trained model to where it runs: one format a module."""

from .fold import FoldCheck, check_fold, fold_batch_norm, is_folded
from .metadata import ExportMetadata, Preprocessing, describe
from .observe import observed_spikes
from .onnx_file import export_onnx
from .prepare import ExportReport

__all__ = [
    "ExportMetadata",
    "ExportReport",
    "FoldCheck",
    "Preprocessing",
    "check_fold",
    "describe",
    "export_onnx",
    "fold_batch_norm",
    "is_folded",
    "observed_spikes",
]
