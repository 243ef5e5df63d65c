#!/bin/sh
# onnxruntime: a window of 2 keeps three keys in Attention and two in GroupQueryAttention, whose lengths are one less than the number of keys.
#
# Installs onnxruntime 1.32.0 and onnx 1.23.2 in a temporary folder, and runs it without this project. Fails where the behaviour is another.
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

print("onnxruntime", onnxruntime.__version__, "onnx", onnx.__version__)
TYPES = {"float32": TensorProto.FLOAT, "int32": TensorProto.INT32, "int64": TensorProto.INT64}


def run(node, feeds, opset):
    given = [helper.make_tensor_value_info(name, TYPES[str(x.dtype)], x.shape) for name, x in feeds.items()]
    wanted = [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in node.output]
    opsets = [helper.make_opsetid("", opset), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(
        helper.make_graph([node], "graph", given, wanted), opset_imports=opsets, ir_version=11)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(None, feeds)


# The value of key j is the unit vector j: what is not 0 in an output are the keys that the row saw.
def seen(row):
    return [j for j, weight in enumerate(row) if weight > 0]


def zeros(*shape):
    return np.zeros(shape, np.float32)


values = np.eye(6, 8, dtype=np.float32)[None, None]
feeds = dict(q=zeros(1, 1, 6, 8), k=zeros(1, 1, 6, 8), v=values)
node = helper.make_node("Attention", ["q", "k", "v"], ["y"], is_causal=1, left_window_size=2)
last = seen(run(node, feeds, 25)[0][0, 0, 5])
print("Attention, left_window_size=2: the last of 6 rows sees keys", last)
assert last == [3, 4, 5]

names = ["q", "k", "v", "past_k", "past_v", "seqlens_k", "total"]
for seqlens_k, width, expected in ((5, -1, [0, 1, 2, 3, 4, 5]), (5, 2, [4, 5]), (3, -1, [0, 1, 2, 5])):
    node = helper.make_node("GroupQueryAttention", names, ["y", "present_k", "present_v"], domain="com.microsoft",
                            num_heads=1, kv_num_heads=1, local_window_size=width)
    feeds = dict(q=zeros(1, 1, 8), k=zeros(1, 1, 8), v=values[:, :, 5], past_k=zeros(1, 1, 5, 8),
                 past_v=values[:, :, :5].copy(), seqlens_k=np.array([seqlens_k], np.int32),
                 total=np.array([6], np.int32))
    keys = seen(run(node, feeds, 21)[0].ravel())
    print(f"GroupQueryAttention, one row, seqlens_k={seqlens_k}, local_window_size={width}: sees {len(keys)} keys, {keys}")
    assert keys == expected

# top-left with is_causal alone, bottom-right once the number of keys is given as well.
feeds = dict(q=zeros(1, 1, 2, 8), k=zeros(1, 1, 6, 8), v=values)
node = helper.make_node("Attention", ["q", "k", "v"], ["y"], is_causal=1)
without = [seen(row) for row in run(node, feeds, 24)[0][0, 0]]
node = helper.make_node("Attention", ["q", "k", "v", "", "", "", "n"], ["y"], is_causal=1)
given = [seen(row) for row in run(node, dict(feeds, n=np.array([6], np.int64)), 24)[0][0, 0]]
print("Attention, causal, 2 rows over 6 keys: rows see", without)
print("the same with nonpad_kv_seqlen=6, which is all of them:", given)
assert without == [[0], [0, 1]] and given == [[0, 1, 2, 3, 4], [0, 1, 2, 3, 4, 5]]
END
