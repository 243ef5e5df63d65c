#!/bin/sh
# NVRTC and its ptxas: a loop whose bound each thread has loaded for itself, on a path that is hardly ever taken, makes all of
# the loop around it code in which threads of a warp may be apart. Each barrier and each shuffle there, also those that have
# nothing to do with the bound, gets a branch in front (BRA.DIV) and a second copy for threads that are apart, though the
# bound is the same in every thread of a warp. `__reduce_max_sync` of the bound, which changes nothing, makes all of it one
# warp's again. One guesses that only the inner loop pays.
#
# Compiles one kernel with three bounds by NVRTC 13.0.88 for sm_90a, and counts instructions by nvdisasm, in a temporary
# folder, without a GPU and without this project. Fails where it is otherwise.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --no-deps nvidia-cuda-nvrtc==13.0.88 nvidia-cuda-nvdisasm==13.2.51
libraries=$(dirname "$(find "$folder/venv" -name 'libnvrtc.so.13')")
nvdisasm=$(find "$folder/venv" -name nvdisasm -type f)
chmod +x "$nvdisasm"
cat > "$folder/count.py" <<'END'
import collections
import ctypes
import re
import subprocess
import sys

nvdisasm, folder = sys.argv[1:]
nvrtc = ctypes.CDLL("libnvrtc.so.13")
KERNEL = """
extern "C" __global__ void kernel(const int *ends, float *out, int tiles) {
    __shared__ float memory[2][64];
    for (int tile = blockIdx.x, step = 0; tile < tiles; tile += gridDim.x, ++step) {
        float sum = memory[step % 2][threadIdx.x];
        for (int turn = 0; turn < 16; ++turn) {
            asm volatile("barrier.cta.sync %0, 64;" ::"r"(1 + turn % 2) : "memory");
            sum += __shfl_xor_sync(~0u, memory[turn % 2][threadIdx.x] * sum, 1);
        }
        if (__any_sync(~0u, sum != sum)) {
            const int end = BOUND;
            for (int i = 0; i < end; ++i) sum += __shfl_xor_sync(~0u, out[i] * sum, 2);
        }
        memory[step % 2][threadIdx.x] = sum;
    }
    out[threadIdx.x] = memory[0][threadIdx.x];
}
"""


def counted(bound):
    """Instructions of the kernel, and of these barriers and branches for threads that are apart."""
    program, size = ctypes.c_void_p(), ctypes.c_size_t()
    source = KERNEL.replace("BOUND", bound).encode()
    assert nvrtc.nvrtcCreateProgram(ctypes.byref(program), source, b"kernel.cu", 0, None, None) == 0
    options = (ctypes.c_char_p * 2)(b"--gpu-architecture=sm_90a", b"--std=c++17")
    assert nvrtc.nvrtcCompileProgram(program, 2, options) == 0
    nvrtc.nvrtcGetCUBINSize(program, ctypes.byref(size))
    cubin = ctypes.create_string_buffer(size.value)
    nvrtc.nvrtcGetCUBIN(program, cubin)
    with open(f"{folder}/kernel.cubin", "wb") as file:
        file.write(cubin.raw)
    text = subprocess.run([nvdisasm, "-c", f"{folder}/kernel.cubin"], check=True, capture_output=True, text=True).stdout
    names = collections.Counter(re.findall(r"\*/\s+(?:@!?U?P\d+\s+)?([A-Z0-9]+(?:\.DIV)?)", text))
    return sum(names.values()), names["BAR"], names["BRA.DIV"]


major, minor = ctypes.c_int(), ctypes.c_int()
nvrtc.nvrtcVersion(ctypes.byref(major), ctypes.byref(minor))
print(f"NVRTC {major.value}.{minor.value}, sm_90a")
of_warp = "ends[tile + threadIdx.x / 32]"
found = {bound: counted(bound) for bound in ("ends[tile]", of_warp, f"__reduce_max_sync(~0u, {of_warp})")}
for bound, (instructions, barriers, apart) in found.items():
    print(f"bound {bound}: {instructions} instructions, {barriers} barriers, {apart} branches for threads that are apart")
one, own, reduced = found.values()
assert one[2] == 0 and reduced[2] == 0 and one[1] == reduced[1] == 16
assert own[2] > 0 and own[1] == 2 * 16 and own[0] > 1.4 * reduced[0]
END
LD_LIBRARY_PATH="$libraries" "$folder/venv/bin/python" "$folder/count.py" "$nvdisasm" "$folder"

# 2026-12-01:
# NVRTC 13.0, sm_90a
# bound ends[tile]: 312 instructions, 16 barriers, 0 branches for threads that are apart
# bound ends[tile + threadIdx.x / 32]: 496 instructions, 32 barriers, 5 branches for threads that are apart
# bound __reduce_max_sync(~0u, ends[tile + threadIdx.x / 32]): 320 instructions, 16 barriers, 0 branches for threads that are apart
