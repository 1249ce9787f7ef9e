"""Models as ONNX files: `to_onnx`."""

from burnish.onnx.errors import OnnxError
from burnish.onnx.export import to_onnx
from burnish.onnx.file import OnnxFile

__all__ = ["OnnxError", "OnnxFile", "to_onnx"]
