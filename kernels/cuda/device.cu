// device.cu - what devices there are. The CUDA runtime is linked in and looks for the driver itself, when first asked.
#include "../kvrun.h"
#include "error.h"
#include <cstdio>
#include <cuda_runtime_api.h>

// Empty; whether the device has code for it says whether it has any.
static __global__ void nothing() {}

#define EXPORT extern "C" __attribute__((visibility("default")))

EXPORT const char *kv_cuda_targets(void) { return KVRUN_TARGETS; }

EXPORT int32_t kv_cuda_count(void) {
    kv::clear_error();
    int count = 0;
    const cudaError_t error = cudaGetDeviceCount(&count);
    if (error == cudaSuccess && count > 0) return count;
    cudaGetLastError();  // the error is told here and must not surface at the next launch
    kv::fail(KV_DEVICE, "%s", cudaGetErrorString(error == cudaSuccess ? cudaErrorNoDevice : error));
    return 0;
}

EXPORT int32_t kv_cuda_driver(void) {
    kv::clear_error();
    int version = 0;
    const cudaError_t error = cudaDriverGetVersion(&version);
    if (error == cudaSuccess) return version;
    cudaGetLastError();
    kv::fail(KV_DEVICE, "%s", cudaGetErrorString(error));
    return 0;
}

EXPORT int32_t kv_cuda_describe(int32_t device, kv_cuda_device *out) {
    kv::clear_error();
    cudaDeviceProp properties;
    size_t free_bytes = 0, total_bytes = 0;
    int current = 0;
    cudaError_t error = cudaGetDeviceProperties(&properties, device);
    if (error == cudaSuccess) error = cudaGetDevice(&current);
    if (error == cudaSuccess) error = cudaSetDevice(device);
    if (error == cudaSuccess) {
        error = cudaMemGetInfo(&free_bytes, &total_bytes);
        cudaFuncAttributes attributes;
        out->built = cudaFuncGetAttributes(&attributes, nothing) == cudaSuccess;
        cudaGetLastError();  // no code is an answer
        const cudaError_t restored = cudaSetDevice(current);
        if (error == cudaSuccess) error = restored;
    }
    if (error == cudaErrorMemoryAllocation) {  // others have so much of it that not even a context fits: a device without free memory
        total_bytes = properties.totalGlobalMem;
        free_bytes = 0;
        out->built = 1;
        error = cudaSuccess;
        cudaGetLastError();
    }
    if (error != cudaSuccess) {
        cudaGetLastError();
        return kv::fail(KV_DEVICE, "device %d: %s", device, cudaGetErrorString(error));
    }
    snprintf(out->name, sizeof out->name, "%s", properties.name);
    out->arch = 10 * properties.major + properties.minor;
    out->reads_host = properties.pageableMemoryAccess;
    out->reserved = 0;
    out->sms = properties.multiProcessorCount;
    out->memory_bytes = (int64_t)total_bytes;
    out->free_bytes = (int64_t)free_bytes;
    return KV_OK;
}
