"""From a training artifact to ONNX graphs and an engine package."""
