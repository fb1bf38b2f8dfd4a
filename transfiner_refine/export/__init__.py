"""Export of a refiner to ONNX and to ``torch.export``, and a runtime for the ONNX graphs that needs no torch."""

from transfiner_refine.export.programs import RefinerPrograms, export_onnx, export_program
from transfiner_refine.export.runtime import OnnxRefiner, RefinedMasks

__all__ = ["OnnxRefiner", "RefinedMasks", "RefinerPrograms", "export_onnx", "export_program"]
