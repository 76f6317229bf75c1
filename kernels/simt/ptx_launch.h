// ptx_launch.h - the translated kernels as their launcher sees them.
#pragma once
#include <cstddef>
#include <cstdint>
#include <vector>

namespace ptx {

struct Range { uint64_t at, bytes; };
// A kernel of a translated module, by its name in PTX.
struct Kernel {
    const char *name;
    void (*run)(void **params);
    unsigned max_threads;
    size_t static_bytes;              // of shared memory
    std::vector<Range> variables;     // where those of the module lie in it
};
// Makes a kernel known when the library is loaded.
struct Enrolled { explicit Enrolled(const Kernel &); };

const Kernel *find_kernel(const char *name);
// nullptr: done. Otherwise what a thread did wrong, or why there was no launch.
const char *launch(const Kernel &, const unsigned (&grid)[3], const unsigned (&block)[3], size_t dynamic_bytes, void **params);

// What was launched before is done, and seen by the host.
void begin_step();

// Of watch.cpp, for launch().
void begin_launch(const std::vector<Range> &variables, uint64_t dynamic_from);
void begin_thread();
void end_thread();
const char *what_failed();

}  // namespace ptx
