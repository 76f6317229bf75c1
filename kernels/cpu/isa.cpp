// isa.cpp - which instruction set this build holds, this CPU has and this kernel grants.
#include "pool.h"
#if defined(__x86_64__) && KV_ISAS_BUILT > 1
#include <cpuid.h>
#endif
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

#define EXPORT extern "C" __attribute__((visibility("default")))

#if defined(__x86_64__) && KV_ISAS_BUILT > 1

// AMX tile data is off in a Linux process until it asks.
static bool amx_granted() {
#if defined(__linux__)
    const long ARCH_REQ_XCOMP_PERM = 0x1023, XFEATURE_XTILEDATA = 18;
    return syscall(SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA) == 0;
#else
    return false;
#endif
}

static int detect() {
    unsigned a, b, c, d;
    if (!__get_cpuid(1, &a, &b, &c, &d)) return KV_ISA_PLAIN;
    auto bit = [](unsigned word, int i) { return (word >> i & 1) != 0; };
    if (!bit(c, 27)) return KV_ISA_PLAIN;                                  // OSXSAVE
    unsigned lo, hi;
    asm volatile("xgetbv" : "=a"(lo), "=d"(hi) : "c"(0));
    bool ymm = (lo & 0x6) == 0x6, zmm = (lo & 0xe6) == 0xe6, tiles = (lo & 0x60000) == 0x60000;
    bool fma = bit(c, 12), f16c = bit(c, 29);
    if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return KV_ISA_PLAIN;
    unsigned sub = a, a1 = 0, b1, c1, d1;
    if (!(ymm && fma && f16c && bit(b, 5))) return KV_ISA_PLAIN;           // AVX2
    if (!(zmm && bit(b, 16) && bit(b, 17) && bit(b, 30) && bit(b, 31))) return KV_ISA_AVX2;   // F, DQ, BW, VL
    if (sub >= 1) __get_cpuid_count(7, 1, &a1, &b1, &c1, &d1);
    bool vnni = bit(c, 11), bf16 = bit(a1, 5), amx = bit(d, 22) && bit(d, 24) && bit(d, 25);
    if (!(tiles && vnni && bf16 && amx && amx_granted())) return KV_ISA_AVX512;
    return KV_ISA_AMX;
}

#else

static int detect() { return KV_ISA_PLAIN; }

#endif

EXPORT int32_t kv_abi(void) { return KV_ABI; }

EXPORT int32_t kv_cpu_isa(void) {
    static const int isa = detect();
    return isa < KV_ISAS_BUILT ? isa : KV_ISAS_BUILT - 1;
}

const kv::Ops *kv::ops_of(int32_t isa) {
    if (isa < 0 || isa > kv_cpu_isa()) return nullptr;
    switch (isa) {
#if KV_ISAS_BUILT > 1
        case KV_ISA_AVX2: return &kv_avx2::ops;
        case KV_ISA_AVX512: return &kv_avx512::ops;
        case KV_ISA_AMX: return &kv_amx::ops;
#endif
        default: return &kv_plain::ops;
    }
}
