// ptx.h - what the C++ that ptx.py makes of PTX stands on: the instructions, and memory that is watched (watch.h). Threads, barriers and
// the scheduler are those of simt.h. Source: PTX ISA 9.0, section 9.7.
#pragma once
#include "ptx_launch.h"
#include "simt.h"
#include "watch.h"
#include <algorithm>
#include <array>
#include <limits>
#include <type_traits>

namespace ptx {

// ---- registers ----
template <class To, class From> inline To cast(From x) { return (To)x; }
// The bits of x as another type; of a wider one the low ones.
template <class To, class From> inline To bits(From x) {
    static_assert(sizeof(To) <= sizeof(From), "a register that is too narrow");
    To to;
    memcpy(&to, &x, sizeof to);
    return to;
}

// ---- special registers ----
inline uint3 tid() { return simt::place.thread; }
inline uint3 ctaid() { return simt::place.block; }
inline dim3 ntid() { return simt::place.block_size; }
inline dim3 nctaid() { return simt::place.grid_size; }

// ---- integers: they wrap, and shifts by more than a number has bits take all of them ----
template <class T> inline T add(T a, T b) { return (T)((std::make_unsigned_t<T>)a + (std::make_unsigned_t<T>)b); }
template <class T> inline T sub(T a, T b) { return (T)((std::make_unsigned_t<T>)a - (std::make_unsigned_t<T>)b); }
template <class T> inline T mul(T a, T b) { return (T)((uint64_t)a * (uint64_t)b); }
inline uint64_t mul_hi(uint64_t a, uint64_t b) { return (uint64_t)((unsigned __int128)a * b >> 64); }
inline uint32_t mul_hi(uint32_t a, uint32_t b) { return (uint32_t)((uint64_t)a * b >> 32); }
inline int32_t mul_hi(int32_t a, int32_t b) { return (int32_t)((int64_t)a * b >> 32); }
template <class T> inline T shl(T a, uint32_t by) { return by >= 8 * sizeof a ? T(0) : (T)((std::make_unsigned_t<T>)a << by); }
template <class T> inline T shr(T a, uint32_t by) { return (T)(a >> std::min<uint32_t>(by, 8 * sizeof a - 1) >> (by >= 8 * sizeof a)); }
// The upper word of b:a after a shift to the left by at most 31.
inline uint32_t shf_l(uint32_t a, uint32_t b, uint32_t by) { return (uint32_t)((((uint64_t)b << 32 | a) << (by & 31)) >> 32); }
template <class T> inline T div(T a, T b) {
    if (!std::is_floating_point_v<T> && b == 0) stop<T>("division by zero");
    return a / b;
}
template <class T> inline T rem(T a, T b) { return b ? (T)(a % b) : stop<T>("division by zero"); }
inline int popc(uint32_t x) { return __builtin_popcount(x); }
inline int popc(uint64_t x) { return __builtin_popcountll(x); }
inline int clz(uint32_t x) { return x ? __builtin_clz(x) : 32; }
template <class T> inline T bfi(T a, T b, uint32_t at, uint32_t length) {
    at &= 255, length &= 255;
    const T ones = length >= 8 * sizeof a ? (T)-1 : (T)((T(1) << length) - 1);
    return at >= 8 * sizeof a ? b : (T)((b & ~(T)(ones << at)) | (T)((a & ones) << at));
}
inline uint32_t prmt(uint32_t a, uint32_t b, uint32_t selector) {
    const uint64_t bytes = (uint64_t)b << 32 | a;
    uint32_t out = 0;
    for (int i = 0; i < 4; i++) {
        const uint32_t choice = selector >> 4 * i & 15, byte = bytes >> 8 * (choice & 7) & 255;
        out |= (choice & 8 ? (byte & 128 ? 255u : 0u) : byte) << 8 * i;
    }
    return out;
}

// ---- floats ----
template <class T> inline bool unordered(T a, T b) { return a != a || b != b; }
template <class T> inline T min(T a, T b) {
    if constexpr (std::is_floating_point_v<T>) return std::fmin(a, b);
    else return b < a ? b : a;
}
template <class T> inline T max(T a, T b) {
    if constexpr (std::is_floating_point_v<T>) return std::fmax(a, b);
    else return a < b ? b : a;
}
template <class T> inline T abs(T x) { return std::is_floating_point_v<T> ? (T)std::fabs(x) : (T)(x < 0 ? -x : x); }
template <class T> inline T neg(T x) {
    if constexpr (std::is_floating_point_v<T>) return -x;
    else return sub<T>(0, x);
}
inline float copysign(float sign, float x) { return std::copysign(x, sign); }
template <class T> inline T sqrt(T x) { return std::sqrt(x); }
template <class T> inline T rcp(T x) { return T(1) / x; }
inline float flush(float x) { return std::fabs(x) < std::numeric_limits<float>::min() ? std::copysign(0.f, x) : x; }
inline float rcp_approx(float x) { return flush(1 / flush(x)); }
inline float ex2_approx(float x) { return flush(std::exp2(flush(x))); }
inline float fma(float a, float b, float c) { return std::fma(a, b, c); }
inline double fma(double a, double b, double c) { return std::fma(a, b, c); }
inline float fma_rm(float a, float b, float c) {
    const double exact = (double)a * b + c;
    const float near = (float)exact;
    return near > exact ? std::nextafter(near, -std::numeric_limits<float>::infinity()) : near;
}
inline float saturate(float x) { return x > 0 ? std::min(x, 1.f) : 0.f; }
template <class T> inline T round_rni(T x) { return std::nearbyint(x); }
template <class T> inline T round_rzi(T x) { return std::trunc(x); }
template <class T> inline T round_rpi(T x) { return std::ceil(x); }
template <class T> inline T round_rmi(T x) { return std::floor(x); }
// A whole number as an integer; what is too large as the largest, NaN as 0.
template <class I, class T> inline I to_integer(T x) {
    if (x != x) return 0;
    if (x <= (T)std::numeric_limits<I>::min()) return std::numeric_limits<I>::min();
    if (x >= (T)std::numeric_limits<I>::max()) return std::numeric_limits<I>::max();
    return (I)x;
}
inline float from_half(uint16_t x) { return __half2float({x}); }
inline uint16_t to_half(float x) { return __float2half_rn(x).bits; }
inline float from_f16(uint16_t x) { return from_half(x); }
inline float from_bf16(uint16_t x) { return __uint_as_float((uint32_t)x << 16); }
inline uint16_t to_bf16(float x) {
    const uint32_t bits = __float_as_uint(x);
    return (uint16_t)(x != x ? 0x7fff : (bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}
inline uint32_t pack_f16x2(float high, float low) { return (uint32_t)to_half(high) << 16 | to_half(low); }
inline uint32_t pack_bf16x2(float high, float low) { return (uint32_t)to_bf16(high) << 16 | to_bf16(low); }
inline uint32_t sub_f16x2(uint32_t a, uint32_t b) {
    return pack_f16x2(from_half((uint16_t)(a >> 16)) - from_half((uint16_t)(b >> 16)), from_half((uint16_t)a) - from_half((uint16_t)b));
}

// ---- a warp ----
struct Shuffled { uint32_t value; bool inside; };
// limits: as the instruction's operand c, the last lane of a segment and which bits of a lane number the segment.
inline Shuffled shuffle(uint32_t value, int from, bool inside, uint32_t mask) {
    const int source = inside ? from : (int)simt::lane();
    if (!(mask >> source & 1)) stop<int>("shuffle from lane %d, which takes no part", source);
    return {(uint32_t)simt::exchange(mask, value, (unsigned)source), inside};
}
inline int last_lane(uint32_t limits) { return (int)((simt::lane() & (limits >> 8 & 31)) | (limits & 31 & ~(limits >> 8))); }
inline int first_lane(uint32_t limits) { return (int)(simt::lane() & (limits >> 8 & 31)); }
inline Shuffled shuffle_bfly(uint32_t value, uint32_t with, uint32_t limits, uint32_t mask) {
    const int from = (int)(simt::lane() ^ (with & 31));
    return shuffle(value, from, from <= last_lane(limits), mask);
}
inline Shuffled shuffle_up(uint32_t value, uint32_t by, uint32_t limits, uint32_t mask) {
    const int from = (int)simt::lane() - (int)(by & 31);
    return shuffle(value, from, from >= last_lane(limits), mask);
}
inline Shuffled shuffle_down(uint32_t value, uint32_t by, uint32_t limits, uint32_t mask) {
    const int from = (int)simt::lane() + (int)(by & 31);
    return shuffle(value, from, from <= last_lane(limits), mask);
}
inline Shuffled shuffle_idx(uint32_t value, uint32_t lane, uint32_t limits, uint32_t mask) {
    const int from = first_lane(limits) | (int)(lane & 31 & ~(limits >> 8));
    return shuffle(value, from, from <= last_lane(limits), mask);
}
template <class T> inline T redux_max(T value, uint32_t mask) {
    for (unsigned with = 16; with > 0; with /= 2) value = std::max(value, (T)simt::exchange(mask, (std::make_unsigned_t<T>)value, simt::lane() ^ with));
    return value;
}
inline void block_barrier() { simt::block_barrier(); after_block_barrier(); }
inline void warp_barrier(uint32_t mask) {
    if (mask != 0xffffffffu) stop<int>("a barrier of some lanes, which watch.cpp does not follow");
    simt::warp_barrier(mask);
    after_warp_barrier();
}

// ---- memory: addresses are the host's, in shared memory offsets ----
extern char *shared_memory;
extern uint64_t shared_bytes, dynamic_at;        // of the launch; where its dynamic part begins
inline uint64_t from_shared(uint64_t at) { return (uint64_t)shared_memory + (uint32_t)at; }
inline uint64_t to_shared(uint64_t at) { return at - (uint64_t)shared_memory; }
inline bool is_shared(uint64_t at) { return at - (uint64_t)shared_memory < shared_bytes; }

template <class T, int N> using Vector = std::array<T, N>;
template <class T, int N> inline Vector<T, N> read(const char *from) {
    Vector<T, N> out;
    memcpy(&out, from, sizeof out);
    return out;
}
template <class T, int N> inline void aligned(uint64_t at) {
    if (at % sizeof(Vector<T, N>)) stop<int>("an address that is no multiple of %d", (int)sizeof(Vector<T, N>));
}
template <class T, class Op> inline T change(char *at, Op op) {
    T old, now;
    memcpy(&old, at, sizeof old);
    now = op(old);
    memcpy(at, &now, sizeof now);
    return old;
}
#define PTX_ATOMICS                                                                                                    \
    template <class T> inline T atom_add(uint64_t at, T x) { return atom<T>(at, [x](T old) { return (T)(old + x); }); }      \
    template <class T> inline T atom_max(uint64_t at, T x) { return atom<T>(at, [x](T old) { return std::max(old, x); }); }  \
    template <class T> inline T atom_min(uint64_t at, T x) { return atom<T>(at, [x](T old) { return std::min(old, x); }); }  \
    template <class T> inline T atom_exch(uint64_t at, T x) { return atom<T>(at, [x](T) { return x; }); }

namespace shared {
template <class T, int N> inline Vector<T, N> ld(uint64_t at) {
    aligned<T, N>((uint32_t)at);
    read_shared((uint32_t)at, sizeof(Vector<T, N>));
    return read<T, N>(shared_memory + (uint32_t)at);
}
template <class T, int N> inline void st(uint64_t at, const Vector<T, N> &x) {
    aligned<T, N>((uint32_t)at);
    write_shared((uint32_t)at, sizeof x, &x);
    memcpy(shared_memory + (uint32_t)at, &x, sizeof x);
}
template <class T, class Op> inline T atom(uint64_t at, Op op) {
    aligned<T, 1>((uint32_t)at);
    atomic_shared((uint32_t)at, sizeof(T));
    return change<T>(shared_memory + (uint32_t)at, op);
}
PTX_ATOMICS
}  // namespace shared

namespace global {
template <class T, int N> inline Vector<T, N> ld(uint64_t at) {
    aligned<T, N>(at);
    read_global(at, sizeof(Vector<T, N>));
    return read<T, N>((const char *)at);
}
template <class T, int N> inline void st(uint64_t at, const Vector<T, N> &x) {
    aligned<T, N>(at);
    write_global(at, sizeof x, &x);
    memcpy((char *)at, &x, sizeof x);
}
template <class T, class Op> inline T atom(uint64_t at, Op op) {
    aligned<T, 1>(at);
    atomic_global(at, sizeof(T));
    return change<T>((char *)at, op);
}
PTX_ATOMICS
}  // namespace global

namespace generic {
template <class T, int N> inline Vector<T, N> ld(uint64_t at) { return is_shared(at) ? shared::ld<T, N>(to_shared(at)) : global::ld<T, N>(at); }
template <class T, int N> inline void st(uint64_t at, const Vector<T, N> &x) { is_shared(at) ? shared::st<T, N>(to_shared(at), x) : global::st<T, N>(at, x); }
template <class T, class Op> inline T atom(uint64_t at, Op op) { return is_shared(at) ? shared::atom<T>(to_shared(at), op) : global::atom<T>(at, op); }
PTX_ATOMICS
}  // namespace generic
#undef PTX_ATOMICS

// Memory that no thread writes and another reads: parameters, a thread's own.
namespace local {
template <class T, int N> inline Vector<T, N> ld(uint64_t at) { return aligned<T, N>(at), read<T, N>((const char *)at); }
template <class T, int N> inline void st(uint64_t at, const Vector<T, N> &x) { aligned<T, N>(at), memcpy((char *)at, &x, sizeof x); }
}  // namespace local
namespace param { using local::ld; using local::st; }

inline void copy_async(uint64_t to, uint64_t from) {
    if ((uint32_t)to % 16 || from % 16) stop<int>("a copy of 16 bytes between addresses that are no multiples of 16");
    begin_copy((uint32_t)to, from, 16);
}

}  // namespace ptx
using ptx::bits;
using ptx::cast;
