"""The two custom ONNX operators. Each file holds one: the torch function, the ONNX node and function body, and the
NumPy reference in double precision, which is also registered with polygraphy's `pluginref` runner."""

DOMAIN = "liteframe"
VERSION = 1
