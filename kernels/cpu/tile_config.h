// tile_config.h - the shapes of the AMX tiles. All are 16 rows of 64 bytes but while quantized pages are attended. What a
// product costs, and what loading and storing its tiles does, is by the row, so few queries get low tiles.
#pragma once
#if defined(__AMX_TILE__)
#include <immintrin.h>
#include <stdint.h>

namespace KV_NS {

// Tiles 0, 4 and 5 (sums and left factors) get `first` rows, tiles 1, 2 and 3 `second`, tiles 6 and 7 (right factors) 16; but 4
// and 5 hold `depth` bytes a row and 6 the depth/4 rows that meet them.
static inline void configure_tiles(int first, int second, int depth) {
    alignas(64) uint8_t config[64] = {};
    config[0] = 1;
    const int rows[8] = {first, second, second, second, first, first, depth / 4, 16};
    for (int i = 0; i < 8; i++) {
        config[16 + 2 * i] = (uint8_t)(i == 4 || i == 5 ? depth : 64);
        config[48 + i] = (uint8_t)rows[i];
    }
    asm volatile("" ::"r"(config) : "memory");   // the compiler may not see that the load below reads config
    _tile_loadconfig(config);
}

}  // namespace KV_NS
#endif
