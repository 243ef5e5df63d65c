#!/bin/sh
# NVRTC (ptxas): a function that is not inlined and multiplies with wgmma makes every wgmma of the kernel that may call it synchronous, on
# the path that never calls it too. The compiler says so as a remark that is printed with -v alone; nothing else tells.
#
# Compiles three kernels with NVRTC 13.0.88 in a temporary folder, without a GPU and without this project. Fails where it is otherwise.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --no-deps nvidia-cuda-nvrtc==13.0.88
libraries=$(dirname "$(find "$folder/venv" -name 'libnvrtc.so.13')")
cat > "$folder/kernels.cu" <<'END'
// A tile of 64 x 8 sums, a product of 64 x 16 and 16 x 8 halves in shared memory.
__device__ inline void multiply(float (&sums)[4], unsigned long long a, unsigned long long b) {
    asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
    for (int i = 0; i < 4; ++i)
        asm volatile("wgmma.mma_async.sync.aligned.m64n8k16.f32.f16.f16 {%0, %1, %2, %3}, %4, %5, 1, 1, 1, 0, 0;"
                     : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
                     : "l"(a + i), "l"(b + i));
    asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
    asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
}

#if RARE == 2
__device__ __noinline__ float rare(float x, unsigned long long a, unsigned long long b) {
    float sums[4] = {x, x, x, x};
    multiply(sums, a, b);
    return sums[0] + sums[1] + sums[2] + sums[3];
}
#elif RARE == 1
__device__ __noinline__ float rare(float x, unsigned long long, unsigned long long) { return expf(x) + logf(x); }
#endif

extern "C" __global__ void __launch_bounds__(128) kernel(float *out, unsigned long long a, unsigned long long b, int steps, int is_rare) {
    float sums[4] = {0, 0, 0, 0};
#if RARE > 0
    // Before the loop, and done with before it begins.
    if (is_rare) sums[0] = rare(out[threadIdx.x], a, b);
#endif
    for (int step = 0; step < steps; ++step) multiply(sums, a + step, b + step);
    for (int i = 0; i < 4; ++i) out[threadIdx.x * 4 + i] = sums[i];
}
END
cat > "$folder/compile.py" <<'END'
import ctypes, sys

nvrtc = ctypes.CDLL("libnvrtc.so.13")
major, minor = ctypes.c_int(), ctypes.c_int()
nvrtc.nvrtcVersion(ctypes.byref(major), ctypes.byref(minor))
print(f"NVRTC {major.value}.{minor.value}, sm_90a")
source = open(sys.argv[1]).read().encode()


def remarks(rare):
    program, size = ctypes.c_void_p(), ctypes.c_size_t()
    assert nvrtc.nvrtcCreateProgram(ctypes.byref(program), source, b"kernels.cu", 0, None, None) == 0
    options = [b"--gpu-architecture=sm_90a", b"--ptxas-options=-v", b"-DRARE=%d" % rare]
    status = nvrtc.nvrtcCompileProgram(program, len(options), (ctypes.c_char_p * len(options))(*options))
    nvrtc.nvrtcGetProgramLogSize(program, ctypes.byref(size))
    log = ctypes.create_string_buffer(size.value)
    nvrtc.nvrtcGetProgramLog(program, log)
    assert status == 0, log.value.decode()
    return [line for line in log.value.decode().splitlines() if "wgmma" in line]


seen = {}
for rare, what in enumerate(["no function", "a function without wgmma", "a function with wgmma"]):
    seen[rare] = remarks(rare)
    print(f"{what} behind a branch: {seen[rare] or 'no remark'}")
assert not seen[0] and not seen[1], "a remark without a reason"
assert any("serialized" in line and "function boundary" in line for line in seen[2]), "no remark"
END
LD_LIBRARY_PATH="$libraries" "$folder/venv/bin/python" "$folder/compile.py" "$folder/kernels.cu"
