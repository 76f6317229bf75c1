// count.h - what a warp's accesses to memory cost, by line of the source: of global memory the sectors of 32 bytes that they touch, of shared
// memory the passes over its 32 banks. Source: CUDA C++ Programming Guide 13.0, "Global Memory" and "Shared Memory" of compute 5.0 and later;
// accesses of 8 and 16 bytes a lane are taken half and quarter warps at a time.
#pragma once
#include <cstdint>
#include <vector>

namespace ptx {

extern uint32_t site;                            // of the instruction that runs
// Numbers of sites, consecutive from the one that is returned; sites: "FILE:LINE instruction".
uint32_t add_sites(const std::vector<const char *> &sites);

// Accesses of a thread one after the other. Lanes that come to a site for the same time are one access of their warp.
void count_access(bool shared, unsigned thread, uint64_t at, uint32_t bytes);
void count_block();                              // a block begins

}  // namespace ptx
