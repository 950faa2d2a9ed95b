"""Exports a trained model to where it runs: one module per format."""

from spikingformer.neurons.observe import observed_spikes

from .fold import FoldCheck, check_fold, fold_batch_norm, is_folded
from .int8_file import Int8Comparison, compare_int8, export_int8, load_int8
from .metadata import ExportMetadata, Preprocessing, describe
from .nir_file import NotInNIR, export_nir
from .onnx_file import export_onnx
from .prepare import ExportReport
from .runtime import Predictor, StepPredictor, load_predictor
from .torch_file import export_aot, export_torch
from .weights_file import export_weights, load_weights

__all__ = [
    "ExportMetadata",
    "ExportReport",
    "FoldCheck",
    "Int8Comparison",
    "NotInNIR",
    "Predictor",
    "Preprocessing",
    "StepPredictor",
    "check_fold",
    "compare_int8",
    "describe",
    "export_aot",
    "export_int8",
    "export_nir",
    "export_onnx",
    "export_torch",
    "export_weights",
    "fold_batch_norm",
    "is_folded",
    "load_int8",
    "load_predictor",
    "load_weights",
    "observed_spikes",
]
