#!/bin/sh
# onnxruntime: Cast with `saturate=0` has gaps. To float8_e5m2, what is from 61440 up to 65536 is NaN and what
# is above is infinity. To float8_e4m3fn, what is above 464 is NaN, but what is from 480 up to 496 is 448. The
# reference of ONNX has infinity, or NaN, from one number on.
#
# Guess before the run: without saturation each dtype has one limit, 464 in e4m3fn and 61440 in e5m2, and all
# that is above becomes the same thing.
#
# Installs onnxruntime 1.32.0 and onnx 1.23.2 in a temporary folder, and runs them without this project. Fails
# where the behaviour is another.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/python"
"$folder/python/bin/pip" install --quiet onnxruntime==1.32.0 onnx==1.23.2 numpy
"$folder/python/bin/python" - <<'END'
import numpy as np
import onnx
import onnxruntime
from onnx import TensorProto, helper
from onnx.reference import ReferenceEvaluator

print("onnxruntime", onnxruntime.__version__, "onnx", onnx.__version__)


# To the 8-bit dtype and back, by onnxruntime and by the reference.
def through(x, dtype):
    nodes = [
        helper.make_node("Cast", ["x"], ["h"], to=dtype, saturate=0),
        helper.make_node("Cast", ["h"], ["y"], to=TensorProto.FLOAT),
    ]
    given = [helper.make_tensor_value_info("x", TensorProto.FLOAT, x.shape)]
    wanted = [helper.make_tensor_value_info("y", TensorProto.FLOAT, x.shape)]
    graph = helper.make_graph(nodes, "graph", given, wanted)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=11)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    reference = ReferenceEvaluator(model).run(None, {"x": x})[0]
    return session.run(None, {"x": x})[0], np.asarray(reference, np.float32)


# Where neighbours have one result: the first, the last, and the result.
def pieces(x, y):
    same = (y[1:] == y[:-1]) | (np.isnan(y[1:]) & np.isnan(y[:-1]))
    starts = np.concatenate([[0], np.flatnonzero(~same) + 1])
    ends = np.concatenate([starts[1:] - 1, [len(x) - 1]])
    return [(float(x[start]), float(x[end]), float(y[start])) for start, end in zip(starts, ends)]


def equal(seen, expected):
    return np.array_equal(np.array(seen), np.array(expected), equal_nan=True)


nan, inf = float("nan"), float("inf")
e4m3fn = np.arange(448, 1024.25, 0.25, dtype=np.float32)
runtime, reference = through(e4m3fn, TensorProto.FLOAT8E4M3FN)
print("e4m3fn, steps of 0.25, onnxruntime:", pieces(e4m3fn, runtime))
print("e4m3fn, the ONNX reference:", pieces(e4m3fn, reference))
four = [(448, 464, 448), (464.25, 479.75, nan), (480, 495.75, 448), (496, 1024, nan)]
assert equal(pieces(e4m3fn, runtime), four)
assert equal(pieces(e4m3fn, reference), [(448, 464, 448), (464.25, 1024, nan)])

e5m2 = np.arange(57344, 131072 + 16, 16, dtype=np.float32)
runtime, reference = through(e5m2, TensorProto.FLOAT8E5M2)
print("e5m2, steps of 16, onnxruntime:", pieces(e5m2, runtime))
print("e5m2, the ONNX reference:", pieces(e5m2, reference))
assert equal(pieces(e5m2, runtime), [(57344, 61424, 57344), (61440, 65520, nan), (65536, 131072, inf)])
assert equal(pieces(e5m2, reference), [(57344, 61424, 57344), (61440, 131072, inf)])
END
