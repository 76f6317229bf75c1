// count.cpp - see count.h.
#include "count.h"
#include <algorithm>
#include <cstdio>
#include <map>
#include <set>
#include <unordered_map>

namespace ptx {

uint32_t site = 0;

struct Lane { uint64_t at; uint32_t bytes; };
struct Sum { uint64_t accesses, units, least; };
// A site is here twice its number, and one more for shared memory: an asynchronous copy has both.
static std::unordered_map<uint64_t, std::vector<Lane>> open;      // by site, warp and how many times a lane had been there
static std::unordered_map<uint64_t, uint32_t> times;              // by site and thread
static std::map<uint32_t, Sum> sums;

static std::vector<const char *> &sites() {
    static std::vector<const char *> all;        // made when the first module has some
    return all;
}
uint32_t add_sites(const std::vector<const char *> &more) {
    const uint32_t first = (uint32_t)sites().size();
    sites().insert(sites().end(), more.begin(), more.end());
    return first;
}

void count_access(bool shared, unsigned thread, uint64_t at, uint32_t bytes) {
    const uint64_t here = 2 * site + shared;
    const uint32_t n = times[here << 16 | thread]++;
    open[here << 40 | (uint64_t)(thread / 32) << 32 | n].push_back({at, bytes});
}

// Sectors that the lanes touch, and those that as many bytes would fill.
static void add_global(const std::vector<Lane> &lanes, Sum &sum) {
    std::set<uint64_t> sectors, bytes;
    for (const Lane &lane : lanes)
        for (uint64_t i = lane.at; i < lane.at + lane.bytes; i++) sectors.insert(i / 32), bytes.insert(i);
    sum.units += sectors.size();
    sum.least += (bytes.size() + 31) / 32;
}
// Passes: lanes whose words lie in one bank and are not the same wait for each other.
static void add_shared(const std::vector<Lane> &lanes, Sum &sum) {
    const size_t at_once = lanes[0].bytes <= 4 ? 32 : lanes[0].bytes == 8 ? 16 : 8;
    for (size_t from = 0; from < lanes.size(); from += at_once) {
        std::set<uint64_t> banks[32];
        for (size_t i = from; i < std::min(lanes.size(), from + at_once); i++)
            for (uint64_t word = lanes[i].at / 4; word <= (lanes[i].at + lanes[i].bytes - 1) / 4; word++) banks[word % 32].insert(word);
        size_t most = 0;
        for (const auto &words : banks) most = std::max(most, words.size());
        sum.units += most;
        sum.least++;
    }
}
void count_block() {
    for (const auto &[key, lanes] : open) {
        Sum &sum = sums[(uint32_t)(key >> 40)];
        sum.accesses++;
        key >> 40 & 1 ? add_shared(lanes, sum) : add_global(lanes, sum);
    }
    open.clear();
    times.clear();
}

}  // namespace ptx

#define EXPORT extern "C" __attribute__((visibility("default")))

// What was counted is forgotten.
EXPORT void kv_count_reset() {
    ptx::open.clear();
    ptx::times.clear();
    ptx::sums.clear();
}

// Calls `tell` for each site that had an access: where and what it is, whether of shared memory, accesses of a warp, sectors or passes, and
// the fewest that could have done.
EXPORT void kv_count_tell(void (*tell)(const char *where, int shared, uint64_t accesses, uint64_t units, uint64_t least)) {
    ptx::count_block();
    for (const auto &[site, sum] : ptx::sums) tell(ptx::sites()[site / 2], site % 2, sum.accesses, sum.units, sum.least);
}
