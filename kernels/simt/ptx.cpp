// ptx.cpp - launches translated kernels on the fibers of simt.cpp.
#include "ptx.h"
#include <cstdlib>
#include <deque>

namespace ptx {

char *shared_memory = nullptr;
uint64_t shared_bytes = 0, dynamic_at = 0;

static std::deque<Kernel> &kernels() {
    static std::deque<Kernel> all;    // made when the first one enrolls
    return all;
}
Enrolled::Enrolled(const Kernel &kernel) { kernels().push_back(kernel); }
const Kernel *find_kernel(const char *name) {
    for (const Kernel &kernel : kernels())
        if (!strcmp(kernel.name, name)) return &kernel;
    return nullptr;
}

const char *launch(const Kernel &kernel, const unsigned (&grid)[3], const unsigned (&block)[3], size_t dynamic_bytes, void **params) {
    if (block[0] * block[1] * block[2] > kernel.max_threads) return "more threads than __launch_bounds__ has";
    uint64_t end = 0;
    for (const Range &v : kernel.variables) end = std::max(end, v.at + v.bytes);
    dynamic_at = (end + 64 + 127) / 128 * 128;
    shared_bytes = dynamic_at + dynamic_bytes;
    if (posix_memalign((void **)&shared_memory, 128, shared_bytes)) return "no memory";
    memset(shared_memory, 0xff, shared_bytes);
    begin_launch(kernel.variables, dynamic_at);
    const cudaError_t error = simt::launch({grid[0], grid[1], grid[2]}, {block[0], block[1], block[2]}, [&] {
        begin_thread();
        kernel.run(params);
        end_thread();
    });
    free(shared_memory);
    return what_failed() ? what_failed() : error != cudaSuccess ? cudaGetErrorString(error) : nullptr;
}

}  // namespace ptx
