#!/bin/sh
# NVRTC: a lambda in a kernel is code for the device, as the function around it is, unless a parameter of it is `auto`: then NVRTC
# takes it for a host function and refuses it. With --device-as-default-execution-space it compiles.
#
# Compiles two kernels with NVRTC 13.0.88 in a temporary folder, without a GPU and without this project. Fails where it is otherwise.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --no-deps nvidia-cuda-nvrtc==13.0.88
libraries=$(dirname "$(find "$folder/venv" -name 'libnvrtc.so.13')")
cat > "$folder/compile.py" <<'END'
import ctypes

nvrtc = ctypes.CDLL("libnvrtc.so.13")
major, minor = ctypes.c_int(), ctypes.c_int()
nvrtc.nvrtcVersion(ctypes.byref(major), ctypes.byref(minor))
print(f"NVRTC {major.value}.{minor.value}, sm_90")
KERNEL = """
extern "C" __global__ void kernel(const int *from, long long *to, int step) {
    const auto at = [&](PARAMETER data) { return data[step * threadIdx.x]; };
    to[threadIdx.x] = at(from);
}
"""


def compiled(parameter, *more):
    """Whether the kernel compiles, and the first error."""
    program, size = ctypes.c_void_p(), ctypes.c_size_t()
    source = KERNEL.replace("PARAMETER", parameter).encode()
    assert nvrtc.nvrtcCreateProgram(ctypes.byref(program), source, b"kernel.cu", 0, None, None) == 0
    options = [b"--gpu-architecture=sm_90", b"--std=c++17", *more]
    status = nvrtc.nvrtcCompileProgram(program, len(options), (ctypes.c_char_p * len(options))(*options))
    nvrtc.nvrtcGetProgramLogSize(program, ctypes.byref(size))
    log = ctypes.create_string_buffer(size.value)
    nvrtc.nvrtcGetProgramLog(program, log)
    errors = [line for line in log.value.decode().splitlines() if "error" in line]
    return status == 0, errors[0] if errors else "no error"


plain, generic = compiled("const int *"), compiled("const auto *")
device = compiled("const auto *", b"--device-as-default-execution-space")
for what, outcome in [("const int *", plain), ("const auto *", generic), ("the same, with the option", device)]:
    print(f"{what}: {'compiles' if outcome[0] else 'refused'}, {outcome[1][:110]}")
assert plain[0] and device[0], "a kernel that compiled does not"
assert not generic[0] and "considered a host function" in generic[1], "a generic lambda is taken"
END
LD_LIBRARY_PATH="$libraries" "$folder/venv/bin/python" "$folder/compile.py"
