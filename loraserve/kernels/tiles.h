/* Products by the processor's tiles (AMX): registers of 16 rows of 64 bytes, two of which are multiplied by one
   instruction. gemm.c's layout of W is what they want: 16 steps of a vector of outputs are one tile.

   A row's sums do not depend on how many rows are multiplied at once, so every number of rows, one included, takes
   these. They take words that are x itself, as gemm.c has them with AVX512-BF16 and VNNI. In bfloat16 the sums of even and of odd inputs of each tile are kept apart. */

#pragma once
#include "types.h"

#if defined(__AMX_BF16__) && defined(__AMX_INT8__) && defined(__AVX512BF16__) && defined(__AVX512VNNI__)
#include <sys/syscall.h>
#include <unistd.h>

#define WRITTEN __asm__ volatile("" ::: "memory") /* gcc 12 does not know what these instructions read */
#define TILE_ROWS 16
#define TILE_BYTES (TILE_ROWS * 64)

static int has_tiles; /* and the system lets this process use them */
__attribute__((constructor)) static void ask_for_tiles(void) {
    has_tiles = syscall(SYS_arch_prctl, 0x1023 /* ARCH_REQ_XCOMP_PERM */, 18 /* tile data */) == 0;
}

/* What the tiles are: 0 to 3 sums, 4 and 5 rows of x, 6 and 7 outputs of W; for 16 rows at most 4 is x, the others W. */
static void configure_tiles(int64_t rows) {
    struct { uint8_t palette, start, reserved[14]; uint16_t bytes[16]; uint8_t rows[16]; } config = {.palette = 1};
    int64_t first = rows < TILE_ROWS ? rows : TILE_ROWS, second = rows - first;
    for (int tile = 0; tile < 8; tile++) {
        int64_t few = tile < 4 ? (second && tile >= 2 ? second : first) : tile == 4 ? first : tile == 5 && second ? second : TILE_ROWS;
        config.bytes[tile] = 64;
        config.rows[tile] = few;
    }
    WRITTEN;
    _tile_loadconfig(&config);
}

#define ZERO_TILES _tile_zero(0); _tile_zero(1); _tile_zero(2); _tile_zero(3)

/* The sums of `rows` rows of x, 32 at most, with 4 vectors of outputs or one, to rows of 4 vectors. `steps` is a multiple
   of 16, `stride` the bytes from one row of x to the next. */
#define TILED(kind, MULTIPLY)                                                                                          \
    static void tiled_##kind(const char *x, int64_t stride, const char *w, int64_t steps, int64_t rows,                \
                             int64_t vectors, char *out) {                                                             \
        int64_t next = steps * 64, pitch = 4 * 64;                                                                     \
        WRITTEN;                                                                                                       \
        if (rows > TILE_ROWS || vectors == 1)                                                                          \
            for (int64_t j = 0; j < vectors; j += 2) {                                                                 \
                const char *a = x, *b = w + j * next;                                                                  \
                ZERO_TILES;                                                                                            \
                for (int64_t p = 0; p < steps; p += 16, a += 64, b += TILE_BYTES) {                                    \
                    _tile_loadd(6, b, 64);                                                                             \
                    _tile_loadd(4, a, stride);                                                                         \
                    MULTIPLY(0, 4, 6);                                                                                 \
                    if (vectors > 1) {                                                                                 \
                        _tile_loadd(7, b + next, 64);                                                                  \
                        MULTIPLY(1, 4, 7);                                                                             \
                    }                                                                                                  \
                    if (rows > TILE_ROWS) {                                                                            \
                        _tile_loadd(5, a + TILE_ROWS * stride, stride);                                                \
                        MULTIPLY(2, 5, 6);                                                                             \
                        if (vectors > 1) MULTIPLY(3, 5, 7);                                                            \
                    }                                                                                                  \
                }                                                                                                      \
                _tile_stored(0, out + j * 64, pitch);                                                                  \
                if (vectors > 1) _tile_stored(1, out + j * 64 + 64, pitch);                                            \
                if (rows > TILE_ROWS) {                                                                                \
                    _tile_stored(2, out + TILE_ROWS * pitch + j * 64, pitch);                                          \
                    if (vectors > 1) _tile_stored(3, out + TILE_ROWS * pitch + j * 64 + 64, pitch);                    \
                }                                                                                                      \
            }                                                                                                          \
        else {                                                                                                         \
            ZERO_TILES;                                                                                                \
            for (int64_t p = 0; p < steps; p += 16, x += 64, w += TILE_BYTES) {                                        \
                _tile_loadd(4, x, stride);                                                                             \
                _tile_loadd(5, w, 64);                                                                                 \
                _tile_loadd(6, w + next, 64);                                                                          \
                _tile_loadd(7, w + 2 * next, 64);                                                                      \
                MULTIPLY(0, 4, 5);                                                                                     \
                _tile_loadd(5, w + 3 * next, 64);                                                                      \
                MULTIPLY(1, 4, 6);                                                                                     \
                MULTIPLY(2, 4, 7);                                                                                     \
                MULTIPLY(3, 4, 5);                                                                                     \
            }                                                                                                          \
            _tile_stored(0, out, pitch); _tile_stored(1, out + 64, pitch);                                             \
            _tile_stored(2, out + 128, pitch); _tile_stored(3, out + 192, pitch);                                      \
        }                                                                                                              \
    }
TILED(bf16, _tile_dpbf16ps)
TILED(int8, _tile_dpbusd)

/* Returns from the caller with the number of rows whose sums are in `out`, if tiles are here and `steps` fits them. */
#define TRY_TILES(kind, x, w, steps, left, vectors, out, configured)                                                   \
    if (has_tiles && steps % 16 == 0) {                                                                                \
        int64_t rows = left < 2 * TILE_ROWS ? left : 2 * TILE_ROWS;                                                    \
        if (*configured != rows) configure_tiles(*configured = rows);                                                  \
        tiled_##kind((const char *)(x), 4 * (steps), w, steps, rows, vectors, (char *)(out));                          \
        return rows;                                                                                                   \
    }
#define TRY_TILES_bf16(...) TRY_TILES(bf16, __VA_ARGS__)
#define TRY_TILES_int8(...) TRY_TILES(int8, __VA_ARGS__)
#define ROWS 32 /* of x at once, at most */

INLINE void release_tiles(int64_t configured) {
    if (configured) _tile_release();
}
#else
#define TRY_TILES_bf16(...)
#define TRY_TILES_int8(...)
#define ROWS 6
INLINE void release_tiles(int64_t configured) {}
#endif
#define TRY_TILES_f32(...)
