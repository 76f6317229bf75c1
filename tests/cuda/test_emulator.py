"""The emulator's own promises: barriers, shuffles of diverged warps, threads that wait for each other for ever, and products as inexact as
tensor cores make them."""

import subprocess

import pytest

from .emulator import KERNELS, SANITIZE

PROGRAM = r"""
#include "simt.h"
#include <cstdio>
#include <vector>

extern "C" void kv_simt_order(uint32_t);

// Each thread's value passes to the next thread of the block through shared memory, `rounds` times.
static void rotate(int *out, int rounds) {
    __shared__ int slot[96];
    int value = threadIdx.x;
    for (int i = 0; i < rounds; i++) {
        slot[(threadIdx.x + 1) % blockDim.x] = value;
        __syncthreads();
        value = slot[threadIdx.x];
        __syncthreads();
    }
    out[blockIdx.x * blockDim.x + threadIdx.x] = value;
}

// Odd and even lanes reduce on their own, the odd ones twice: their barriers must not mix.
static void halves(int *out) {
    const bool odd = threadIdx.x & 1;
    const unsigned mask = odd ? 0xaaaaaaaau : 0x55555555u;
    int sum = 0;
    for (int round = 0; round < (odd ? 2 : 1); round++) {
        sum = threadIdx.x;
        for (int lane = 16; lane > 1; lane /= 2) sum += __shfl_xor_sync(mask, sum, lane);
    }
    out[threadIdx.x] = sum;
}

// A shuffle of the whole warp and a vote right after it, again and again.
static void mixed(int *out) {
    int sum = 0;
    for (int round = 0; round < 4; round++) {
        sum += __shfl_xor_sync(0xffffffffu, (int)threadIdx.x + round, 1);
        sum += __popc(__ballot_sync(0xffffffffu, threadIdx.x % (round + 2) == 0));
    }
    out[threadIdx.x] = sum;
}

static void stuck() {
    if (threadIdx.x == 0) __syncwarp(); else __syncthreads();
}

// Copies in three groups, of which each thread reads what it has waited for, and poison elsewhere.
static void copied(const float *in, int *wrong) {
    float *to = (float *)simt::dynamic_shared() + 3 * threadIdx.x;
    for (int i = 0; i < 3; i++) {
        simt::copy_async(to + i, in + 3 * threadIdx.x + i, 4);
        simt::commit_copies();
    }
    for (int pending = 3; pending >= 0; pending--) {
        simt::wait_copies(pending);
        for (int i = 0; i < 3; i++) {
            const bool there = i < 3 - pending;
            *wrong += there ? to[i] != in[3 * threadIdx.x + i] : !(to[i] != to[i]);
        }
        __syncthreads();
    }
}

// The last block of each counter, in whatever order blocks come, sees what all have written, and leaves a zero.
static void arrive(unsigned *counter, const int *seen, int *out) {
    ((int *)seen)[blockIdx.x] += 1;
    __shared__ bool last;
    if (threadIdx.x == 0) last = atomicAdd(counter, 1u) == gridDim.x - 1;
    __syncthreads();
    if (!last || threadIdx.x > 0) return;
    for (unsigned i = 0; i < gridDim.x; i++) *out += seen[i] == 1;
    *counter = 0;
}

// A warp's product of 16 x 16 and 16 x 8 halves, onto d [16][8]; fragments as in the PTX manual.
static void product(const float *a, const float *b, float *d) {
    const int g = threadIdx.x / 4, t = threadIdx.x % 4;
    auto two = [](float x, float y) { return (uint32_t)__half_as_ushort(__float2half_rn(x)) | (uint32_t)__half_as_ushort(__float2half_rn(y)) << 16; };
    uint32_t left[4], right[2];
    for (int i = 0; i < 4; i++) {
        const float *at = a + (g + i % 2 * 8) * 16 + 2 * t + i / 2 * 8;
        left[i] = two(at[0], at[1]);
    }
    for (int i = 0; i < 2; i++) right[i] = two(b[(2 * t + 8 * i) * 8 + g], b[(2 * t + 8 * i + 1) * 8 + g]);
    float *low = d + g * 8 + 2 * t, *high = low + 64, sums[4] = {low[0], low[1], high[0], high[1]};
    simt::mma_m16n8k16(sums, left, right, [](uint16_t bits) { return __half2float(__ushort_as_half(bits)); });
    low[0] = sums[0], low[1] = sums[1], high[0] = sums[2], high[1] = sums[3];
}

int main() {
    std::vector<int> out(2 * 96);
    if (simt::launch(2, 96, [&] { rotate(out.data(), 5); })) return 1;
    for (int i = 0; i < 192; i++) if (out[i] != (i % 96 + 96 - 5) % 96) return 2;
    if (simt::launch(1, 64, [&] { halves(out.data()); })) return 3;
    for (int i = 0; i < 64; i++) {
        int want = 0;
        for (int j = i / 32 * 32; j < i / 32 * 32 + 32; j++) if (j % 2 == i % 2) want += j;
        if (out[i] != want) return 4;
    }
    if (simt::launch(1, 64, stuck) != cudaErrorLaunchTimeout) return 5;
    if (simt::launch(1, 2048, stuck) != cudaErrorInvalidConfiguration) return 6;
    if (simt::launch(1, 64, [&] { halves(out.data()); })) return 7;   // and the emulator still works
    for (unsigned order = 0; order < 5; order++) {
        kv_simt_order(order);
        if (simt::launch(1, 64, [&] { mixed(out.data()); })) return 8;
        for (int i = 0; i < 64; i++) {
            int want = 0;
            for (int round = 0; round < 4; round++) {
                want += (i ^ 1) + round;
                for (int j = i / 32 * 32; j < i / 32 * 32 + 32; j++) want += j % (round + 2) == 0;
            }
            if (out[i] != want) return 9;
        }
    }
    float in[96];
    for (int i = 0; i < 96; i++) in[i] = i;
    int wrong = 0;
    if (simt::launch(1, 32, 3 * 32 * 4, [&] { copied(in, &wrong); }) || wrong) return 10;
    for (unsigned order = 0; order < 7; order++) {
        kv_simt_order(order);
        unsigned counter = 0;
        int seen[30] = {}, out = 0;
        if (simt::launch(30, 1, [&] { arrive(&counter, seen, &out); }) || out != 30 || counter) return 11;
    }
    if (simt::launch(1, 1, 97 * 1024, stuck) != cudaErrorInvalidConfiguration) return 12;
    float a[16 * 16], b[16 * 8], d[16 * 8];
    for (int i = 0; i < 256; i++) a[i] = i * 7 % 31 - 15;
    for (int i = 0; i < 128; i++) b[i] = i * 11 % 23 - 11, d[i] = i;
    if (simt::launch(1, 32, [&] { product(a, b, d); })) return 13;
    for (int i = 0; i < 128; i++) {                               // whole numbers are exact
        int want = i;
        for (int k = 0; k < 16; k++) want += (int)a[i / 8 * 16 + k] * (int)b[k * 8 + i % 8];
        if (d[i] != want) return 14;
    }
    // Sixteen times 2^-24 is lost beside 1, 2^-23 is not; and what is not a number stays visible.
    for (int i = 0; i < 256; i++) a[i] = 1 / 4096.f;
    for (int i = 0; i < 128; i++) b[i] = (i % 8 == 1 ? 2 : i % 8 == 2 ? -1 : i % 8 == 3 ? NAN : 1) / 4096.f, d[i] = 1;
    if (simt::launch(1, 32, [&] { product(a, b, d); })) return 15;
    for (int i = 0; i < 128; i++)
        if (i % 8 == 3 ? d[i] == d[i] : d[i] != (i % 8 == 1 ? 1 + 1 / 524288.f : 1.f)) return 16;
    return 0;
}
"""


@pytest.mark.parametrize("sanitize", ["", " ".join(SANITIZE)])
def test_barriers_and_shuffles(cxx, tmp_path, sanitize):
    source = tmp_path / "program.cpp"
    source.write_text(PROGRAM, encoding="utf-8")
    flags = sanitize.split()
    if sanitize:
        empty = tmp_path / "empty.cpp"
        empty.write_text("int main() {}", encoding="utf-8")
        if subprocess.run([cxx, *flags, str(empty), "-o", str(tmp_path / "empty")], capture_output=True).returncode:
            pytest.skip("this compiler has no sanitizers")
    subprocess.run([cxx, "-std=c++17", "-O1", "-g", *flags, "-I", str(KERNELS / "simt"), str(source),
                    str(KERNELS / "simt/simt.cpp"), "-o", str(tmp_path / "program")], check=True)
    run = subprocess.run([str(tmp_path / "program")], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
