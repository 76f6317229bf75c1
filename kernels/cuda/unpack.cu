// unpack.cu - packed weights as a dense row-major matrix, for matrix libraries.
#include "launch.cuh"
#include "weight.cuh"

namespace kv {

static __global__ void unpack(kv_weight w, int64_t row0, int64_t rows, void *out, int32_t dtype) {
    begin_kernel();
    const int64_t row = (int64_t)blockIdx.y * blockDim.y + threadIdx.y;
    const int pair = blockIdx.x * blockDim.x + threadIdx.x;
    if (row >= rows || 2 * pair >= w.k) return;
    const float2 v = weight_pair(w, row0 + row, 2 * pair);
    const int64_t at = row * (w.k / 2) + pair;
    if (dtype == KV_F32) ((float2 *)out)[at] = v;
    else if (dtype == KV_BF16) ((uint32_t *)out)[at] = Bf16::bits(v.x) | Bf16::bits(v.y) << 16;
    else ((uint32_t *)out)[at] = F16::bits(v.x) | F16::bits(v.y) << 16;
}

// A block takes 16 rows and 16 pairs of columns: both what it reads and what it writes are pieces of 64 bytes and more.
cudaError_t launch_unpack(const kv_weight &w, int64_t row0, int64_t rows, void *out, int32_t dtype, cudaStream_t stream) {
    for (int64_t row = 0; row < rows;) {            // a grid has at most 65535 blocks in y
        const int64_t n = rows - row < 65535 * 16 ? rows - row : 65535 * 16;
        const int size = dtype == KV_F32 ? 4 : 2;
        const cudaError_t error = launch(unpack, dim3((w.k / 2 + 15) / 16, (unsigned)((n + 15) / 16)), dim3(16, 16), stream, w, row0 + row, n,
                                         (void *)((char *)out + row * w.k * size), dtype);
        if (error != cudaSuccess) return error;
        row += n;
    }
    return cudaSuccess;
}

}  // namespace kv
