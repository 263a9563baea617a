"""Both operators through TensorRT's published Python bindings, as its builder would call them, without TensorRT.

    python published_plugins.py FOLDER CASES

FOLDER holds the package tensorrt_bindings. Its C++ part and all of its `plugin` are as published; the registry, the
symbolic expressions and the launch are stand-ins, which compute with numbers. CASES is JSON: a list of {name,
attributes, inputs, type_}; printed is JSON: what becomes of each.
"""

import json
import sys
from types import SimpleNamespace

import numpy as np

folder, cases = sys.argv[1:]
sys.path.insert(0, folder)
import tensorrt_bindings as trt  # noqa: E402

sys.modules["tensorrt"] = trt


class Expression:
    def __init__(self, value, constant=True):
        self.value, self.constant = value, constant

    def is_constant(self):
        return self.constant

    def get_constant_value(self):
        assert self.constant, "TensorRT does not tell sizes that vary"
        return self.value


class Builder:
    def constant(self, value):
        return Expression(value)

    def operation(self, operation, a, b):
        compute = {"SUM": lambda: a.value + b.value, "PROD": lambda: a.value * b.value,
                   "CEIL_DIV": lambda: -(-a.value // b.value), "FLOOR_DIV": lambda: a.value // b.value}  # fmt: skip
        return Expression(compute[operation.name](), a.constant and b.constant)


class Dimensions(list):
    def __init__(self, count):
        super().__init__([None] * count)


class Registry:
    def __init__(self):
        self.creators = {}

    def register_creator(self, creator, namespace):
        self.creators[creator.name] = creator
        return True

    def get_creator(self, name, version, namespace):
        assert (version, namespace) == ("1", "liteframe")
        return self.creators.get(name)


class Arguments(list):
    nbSymExprs = 0

    def __setitem__(self, number, value):
        assert number == len(self)
        self.append(value)


class SymbolicArgument:
    pass


registry = Registry()
trt.IDimensionExpr, trt.DimsExprs, trt.ISymExpr = Expression, Dimensions, SymbolicArgument
trt.get_plugin_registry = lambda: registry

import tensorrt_bindings.plugin  # noqa: E402

sys.modules["tensorrt.plugin"] = tensorrt_bindings.plugin
from liteframe.engines import aot_plugins  # noqa: E402


def dimensions(sizes):
    made = Dimensions(len(sizes))
    for axis, size in enumerate(sizes):
        made[axis] = Expression(size, constant=axis > 0 or len(sizes) != 4)  # the number of clips varies
    return made


def described(sizes, type_):
    desc = trt.DynamicPluginTensorDesc()
    desc.desc.dims, desc.desc.type, desc.desc.format = trt.Dims(sizes), type_, trt.TensorFormat.LINEAR
    desc.min = desc.max = desc.opt = trt.Dims(sizes)
    return desc


def build(name, attributes, inputs, type_):
    type_ = getattr(trt, type_)
    creator = registry.creators[name]
    assert {field.name for field in creator.field_names} == {*attributes}
    arrays = {key: np.array([value], np.int32) for key, value in attributes.items()}  # a field does not keep its data
    given = [trt.PluginField(key, array, trt.PluginFieldType.INT32) for key, array in arrays.items()]
    plugin = creator.create_plugin(
        name, "liteframe", trt.PluginFieldCollection(given), trt.TensorRTPhase.BUILD,
        trt.QuickPluginCreationRequest.STRICT_AOT,
    )  # fmt: skip
    builder = Builder()
    (found_type,) = plugin.get_output_data_types([type_] * len(inputs), [len(sizes) for sizes in inputs])
    assert found_type == type_
    given = [dimensions(sizes) for sizes in inputs]
    (out,) = plugin.get_output_shapes(given, [], builder)
    sizes = [size.value for size in out]
    in_out = [described(one, type_) for one in (*inputs, sizes)]
    combinations = plugin.get_supported_format_combinations(in_out, len(inputs))
    rows = {tuple(one.type.name for one in combinations[i : i + len(in_out)])
            for i in range(0, len(combinations), len(in_out))}  # fmt: skip
    assert rows == {(kind,) * len(in_out) for kind in ("FLOAT", "HALF", "BF16")}
    plugin.configure_plugin(in_out[: len(inputs)], in_out[len(inputs) :])
    plugin.set_tactic(0)
    launch, arguments = SimpleNamespace(), Arguments()
    plugin.get_launch_params(given, in_out, len(inputs), launch, arguments, builder)
    descs = [one.desc for one in in_out]
    kernel, code = plugin.clone().get_kernel(descs[: len(inputs)], descs[len(inputs) :])
    assert f".entry {kernel}(".encode() in code and arguments.nbSymExprs == len(arguments)
    return {
        "kernel": kernel,
        "output": sizes,
        "grid": [getattr(launch, f"grid_{axis}").expr.value for axis in "xyz"],
        "block": [getattr(launch, f"block_{axis}").expr.value for axis in "xyz"],
        "shared": launch.shared_mem.expr.value,
        "arguments": [argument.expr.value for argument in arguments],
    }


aot_plugins.register("8.0")
print(json.dumps([build(**case) for case in json.loads(cases)]))
