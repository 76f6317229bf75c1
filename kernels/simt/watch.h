// watch.h - what compute-sanitizer looks for on a GPU, on the host: accesses to shared memory that no variable has, reads of what was
// never written there, and two accesses to the same bytes, one of them a write of another value, that nothing puts in order - whichever
// came first this time. Order comes from the barriers of a block or a warp, from the end of the kernel before, and between blocks from an atomic on the same
// word with fences (__threadfence) around it. A shuffle, a vote or a matrix product orders no memory, as CUDA's manual has it.
#pragma once
#include <cstddef>
#include <cstdint>
#include <vector>

namespace ptx {

// Ends the thread; the launch reports the message. Returns nothing, as a T.
void stop_thread(const char *format, ...) __attribute__((format(printf, 1, 2), noreturn));
template <class T, class... Args> [[noreturn]] T stop(const char *format, Args... args) { stop_thread(format, args...); }
template <class T> [[noreturn]] T stop(const char *message) { stop_thread("%s", message); }

void read_shared(uint32_t at, uint32_t bytes);
void write_shared(uint32_t at, uint32_t bytes, const void *value);
void atomic_shared(uint32_t at, uint32_t bytes);
void read_global(uint64_t at, uint32_t bytes);
void write_global(uint64_t at, uint32_t bytes, const void *value);
void atomic_global(uint64_t at, uint32_t bytes);
void after_block_barrier();
void after_warp_barrier();
void fence();
void prefetch(uint64_t at);

// cp.async: bytes are under way from the copy to the end of the wait for its group, and nobody may touch them.
void begin_copy(uint32_t to, uint64_t from, uint32_t bytes);
void commit_copies();
void wait_copies(unsigned pending);

// griddepcontrol: before wait, a kernel may ask for memory, not read or write it.
void let_the_next_begin();
void wait_for_the_kernel_before();

}  // namespace ptx
