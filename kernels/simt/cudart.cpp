// cudart.cpp - as much of the CUDA runtime as nvcc's host code and ours call, over the translated kernels: it stands where
// libcudart_static does in libkvrun_cuda. One device, whose memory is the host's and whose work is done when a call returns.
#include "../kvrun.h"
#include "ptx_launch.h"
#include <cstdio>
#include <cstring>
#include <cuda_runtime_api.h>
#include <unordered_map>

namespace {

struct Function { const char *name; const ptx::Kernel *kernel; int dynamic_limit; };
std::unordered_map<const void *, Function> &functions() {
    static std::unordered_map<const void *, Function> all;       // made when the first module registers
    return all;
}
char message[640] = "no error";
cudaError_t failed(cudaError_t error, const char *text) {
    snprintf(message, sizeof message, "%s", text);
    return error;
}
Function *find(const void *function) {
    const auto found = functions().find(function);
    if (found == functions().end()) return nullptr;
    Function &f = found->second;
    if (!f.kernel) f.kernel = ptx::find_kernel(f.name);          // not when it registers: its module may enroll later
    return f.kernel ? &f : nullptr;
}

constexpr size_t kMemory = size_t(8) << 30;
constexpr int kSharedOfBlock = 99 * 1024;        // what a block can have where it can have least: compute 8.6, 8.9, 12.0

cudaError_t launch(const void *function, dim3 grid, dim3 block, void **params, size_t dynamic_bytes) {
    const Function *f = find(function);
    if (!f) return failed(cudaErrorInvalidDeviceFunction, "a kernel that was never registered");
    if (dynamic_bytes > (size_t)f->dynamic_limit) return failed(cudaErrorInvalidValue, "more dynamic shared memory than cudaFuncSetAttribute allowed");
    if (dynamic_bytes + f->kernel->static_bytes > (size_t)kSharedOfBlock) return failed(cudaErrorInvalidValue, "more shared memory than a block can have");
    const char *wrong = ptx::launch(*f->kernel, {grid.x, grid.y, grid.z}, {block.x, block.y, block.z}, dynamic_bytes, params);
    if (!wrong) return cudaSuccess;
    char text[640];
    snprintf(text, sizeof text, "%s in %.100s", wrong, f->kernel->name);
    return failed(cudaErrorLaunchFailure, text);
}

}  // namespace

extern "C" {

void **__cudaRegisterFatBinary(void *) {
    static void *module;
    return &module;
}
void __cudaRegisterFatBinaryEnd(void **) {}
void __cudaUnregisterFatBinary(void **) {}
char __cudaInitModule(void **) { return 0; }
void __cudaRegisterFunction(void **, const char *host, char *, const char *name, int, uint3 *, uint3 *, dim3 *, dim3 *, int *) {
    functions()[host] = {name, nullptr, 48 * 1024};
}
cudaError_t __cudaGetKernel(cudaKernel_t *kernel, const void *function) {
    *kernel = (cudaKernel_t)function;
    return cudaSuccess;
}
unsigned __cudaPushCallConfiguration(dim3, dim3, size_t, cudaStream_t) { return 1; }
cudaError_t __cudaPopCallConfiguration(dim3 *, dim3 *, size_t *, void *) { return failed(cudaErrorNotSupported, "a launch with <<<>>>"); }
cudaError_t __cudaLaunchKernel(cudaKernel_t kernel, dim3 grid, dim3 block, void **params, size_t dynamic_bytes, cudaStream_t) {
    return launch((const void *)kernel, grid, block, params, dynamic_bytes);
}

cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t *config, const void *function, void **params) {
    return launch(function, config->gridDim, config->blockDim, params, config->dynamicSmemBytes);
}
cudaError_t cudaFuncSetAttribute(const void *function, cudaFuncAttribute attribute, int value) {
    Function *f = find(function);
    if (!f || attribute != cudaFuncAttributeMaxDynamicSharedMemorySize) return failed(cudaErrorInvalidValue, "an attribute that is not known");
    if (value > kSharedOfBlock) return failed(cudaErrorInvalidValue, "more shared memory than a block can have");
    f->dynamic_limit = value;
    return cudaSuccess;
}
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes *attributes, const void *function) {
    const Function *f = find(function);
    if (!f) return failed(cudaErrorInvalidDeviceFunction, "a kernel that was never registered");
    *attributes = {};
    attributes->ptxVersion = attributes->binaryVersion = KVRUN_ARCH;
    attributes->sharedSizeBytes = f->kernel->static_bytes;
    attributes->maxThreadsPerBlock = (int)f->kernel->max_threads;
    return cudaSuccess;
}
cudaError_t cudaMemcpyAsync(void *to, const void *from, size_t bytes, cudaMemcpyKind, cudaStream_t) {
    memcpy(to, from, bytes);
    return cudaSuccess;
}
cudaError_t cudaMemGetInfo(size_t *free_bytes, size_t *total) {
    *free_bytes = *total = kMemory;
    return cudaSuccess;
}
cudaError_t cudaGetDeviceProperties(cudaDeviceProp *properties, int device) {
    if (device) return failed(cudaErrorInvalidDevice, "invalid device ordinal");
    memset((void *)properties, 0, sizeof *properties);
    snprintf(properties->name, sizeof properties->name, "PTX on the host");
    properties->major = KVRUN_ARCH / 10;
    properties->minor = KVRUN_ARCH % 10;
    properties->multiProcessorCount = 4;
    properties->pageableMemoryAccess = 1;
    return cudaSuccess;
}
cudaError_t cudaGetDevice(int *device) { return *device = 0, cudaSuccess; }
cudaError_t cudaSetDevice(int device) { return device ? failed(cudaErrorInvalidDevice, "invalid device ordinal") : cudaSuccess; }
cudaError_t cudaGetDeviceCount(int *count) { return *count = 1, cudaSuccess; }
cudaError_t cudaDriverGetVersion(int *version) { return *version = CUDART_VERSION, cudaSuccess; }
cudaError_t cudaGetLastError() { return cudaSuccess; }
const char *cudaGetErrorString(cudaError_t error) { return error == cudaSuccess ? "no error" : message; }

// step.cpp is built with that name for its own.
int32_t kv_cuda_step_within(const kv_op *, int32_t, const kv_cuda_bounds *, kv_state *, void *, uint64_t);
__attribute__((visibility("default"))) int32_t kv_cuda_step(const kv_op *ops, int32_t n_ops, const kv_cuda_bounds *bounds, kv_state *state, void *scratch, uint64_t stream) {
    ptx::begin_step();
    return kv_cuda_step_within(ops, n_ops, bounds, state, scratch, stream);
}

}  // extern "C"
