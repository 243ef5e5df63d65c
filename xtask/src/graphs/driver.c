// Stands for the CUDA driver where there is none: enough for cuDNN to choose an engine and compile its kernel for a device
// that is described. Nothing can run with it.

int cuDriverGetVersion(int *version) {
    *version = 13000;
    return 0;
}

// Whatever is loaded is somewhere.
#define LOADS(name)                   \
    int name(void **loaded) {         \
        *loaded = (void *)16;         \
        return 0;                     \
    }
LOADS(cuLibraryGetKernel)
LOADS(cuLibraryLoadData)
LOADS(cuLibraryLoadFromFile)

#define SUCCEEDS(name) int name(void) { return 0; }
SUCCEEDS(cuKernelGetAttribute)
SUCCEEDS(cuKernelSetAttribute)
SUCCEEDS(cuLibraryUnload)
SUCCEEDS(cuOccupancyMaxPotentialClusterSize)

// CUDA_ERROR_NO_DEVICE.
#define HAS_NO_DEVICE(name) int name(void) { return 100; }
HAS_NO_DEVICE(cuCtxGetCurrent)
HAS_NO_DEVICE(cuCtxGetLimit)
HAS_NO_DEVICE(cuCtxPopCurrent)
HAS_NO_DEVICE(cuCtxPushCurrent)
HAS_NO_DEVICE(cuDeviceGet)
HAS_NO_DEVICE(cuDeviceGetCount)
HAS_NO_DEVICE(cuGetErrorName)
HAS_NO_DEVICE(cuGetErrorString)
HAS_NO_DEVICE(cuLaunchCooperativeKernel)
HAS_NO_DEVICE(cuLaunchKernel)
HAS_NO_DEVICE(cuLaunchKernelEx)
HAS_NO_DEVICE(cuLinkAddData)
HAS_NO_DEVICE(cuLinkComplete)
HAS_NO_DEVICE(cuLinkCreate)
HAS_NO_DEVICE(cuLinkDestroy)
HAS_NO_DEVICE(cuStreamGetCtx)
