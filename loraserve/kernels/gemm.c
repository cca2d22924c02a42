/* y (m, n) = x (m, k) Wᵀ with W laid out once for this, in three widths: float32, bfloat16, and int8, which takes
   activations of either type. A row's result depends on that row alone: its sums run over k in one order, whatever
   stands beside it.

   Layout of W: for each 16 outputs in turn, for each `step` inputs in turn, 64 bytes, the step weights of each output.
   step is 1, 2 or 4. Outputs are filled up with zeros to a multiple of 16; k is a multiple of 16.

   int8: x is rounded to 8 bits row by row, x = scale (q - 128), and W by output, so
   y = scale · w_scale · (Σ q W - 128 Σ W). */

#ifndef T

#ifdef __AVX512F__
#include <immintrin.h>
#endif
#include "types.h"

#define ROWS 6    /* of x by */
#define VECTORS 4 /* vectors of outputs: their sums stay in registers */
#define INLINE static inline __attribute__((always_inline))
#define UNROLL _Pragma("GCC unroll 8")

typedef int32_t vector_i32 __attribute__((vector_size(4 * WIDTH)));
typedef union { uint32_t u; float f; } number;

INLINE vector dot_f32(vector sum, uint32_t x, vector_u32 w) { return sum + ((number){x}).f * (vector)w; }

INLINE vector dot_bf16(vector sum, uint32_t x, vector_u32 w) {
#ifdef __AVX512BF16__
    return (vector)_mm512_dpbf16_ps((__m512)sum, (__m512bh)_mm512_set1_epi32(x), (__m512bh)w);
#else
    sum += ((number){x << 16}).f * (vector)(w << 16);
    return sum + ((number){x & 0xffff0000}).f * (vector)(w & 0xffff0000);
#endif
}

INLINE vector_i32 dot_int8(vector_i32 sum, uint32_t x, vector_u32 w) {
#ifdef __AVX512VNNI__
    __m512i a = _mm512_set1_epi32(x); /* not as an intrinsic, for which gcc 12 copies the sums to and fro */
    __asm__("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(a), "v"(w));
#else
    UNROLL for (int byte = 0; byte < 32; byte += 8) sum += (int32_t)(x >> byte & 255) * ((vector_i32)(w << (24 - byte)) >> 24);
#endif
    return sum;
}

#define TILE(name, X, step, SUM, dot)                                                                                  \
    INLINE void name(const X *x, const char *w, int64_t k, const int rows, const int vectors,                          \
                     SUM sums[ROWS][VECTORS]) {                                                                        \
        UNROLL for (int i = 0; i < rows; i++) UNROLL for (int j = 0; j < vectors; j++) sums[i][j] = (SUM){0};          \
        for (int64_t p = 0; p < k / step; p++) {                                                                       \
            vector_u32 weights[VECTORS];                                                                               \
            UNROLL for (int j = 0; j < vectors; j++) memcpy(weights + j, w + (j * (k / step) + p) * 64, 64);           \
            UNROLL for (int i = 0; i < rows; i++) {                                                                    \
                uint32_t inputs;                                                                                       \
                memcpy(&inputs, x + i * k + p * step, 4);                                                              \
                UNROLL for (int j = 0; j < vectors; j++) sums[i][j] = dot(sums[i][j], inputs, weights[j]);             \
            }                                                                                                          \
        }                                                                                                              \
    }
TILE(tile_f32, float, 1, vector, dot_f32)
TILE(tile_bf16, uint16_t, 2, vector, dot_bf16)
TILE(tile_int8, uint8_t, 4, vector_i32, dot_int8)

/* What one thread does: all rows of x by blocks of the outputs' vectors, as many at once as registers hold. */
#define ALL_ROWS(block, vectors)                                                                                       \
    do {                                                                                                               \
        int64_t i = 0;                                                                                                 \
        for (; m - i >= 6; i += 6) block(i, 6, vectors);                                                               \
        if (m - i >= 4) block(i, 4, vectors), i += 4;                                                                  \
        if (m - i >= 2) block(i, 2, vectors), i += 2;                                                                  \
        if (m - i >= 1) block(i, 1, vectors);                                                                          \
    } while (0)
#define ALL_OUTPUTS(block)                                                                                             \
    for (int64_t v = 0; v < (n + WIDTH - 1) / WIDTH; v += VECTORS) {                                                   \
        if (v + VECTORS <= (n + WIDTH - 1) / WIDTH) {                                                                  \
            int64_t at = v;                                                                                            \
            ALL_ROWS(block, VECTORS);                                                                                  \
        } else                                                                                                         \
            for (int64_t at = v; at < (n + WIDTH - 1) / WIDTH; at++) ALL_ROWS(block, 1);                               \
    }

#define T float
#define SUFFIX f32
#define STEP 1
#define LOAD(x) (x)
#define STORE(x) (x)
#include "gemm.c"
#undef T
#undef SUFFIX
#undef STEP
#undef LOAD
#undef STORE

#define T uint16_t
#define SUFFIX bf16
#define STEP 2
#define LOAD(x) from_bf16(x)
#define STORE(x) to_bf16(x)
#include "gemm.c"

#else

INLINE void FN(store)(T *y, vector sum, int64_t count) {
    if (count >= WIDTH)
#pragma omp simd
        for (int j = 0; j < WIDTH; j++) y[j] = STORE(sum[j]);
    else
        for (int j = 0; j < count; j++) y[j] = STORE(sum[j]);
}

INLINE void FN(block)(const T *x, const char *w, T *y, int64_t k, int64_t n, int64_t at, const int rows,
                      const int vectors) {
    vector sums[ROWS][VECTORS];
    FN(tile)(x, w + at * (k / STEP) * 64, k, rows, vectors, sums);
    UNROLL for (int i = 0; i < rows; i++) UNROLL for (int j = 0; j < vectors; j++)
        FN(store)(y + i * n + (at + j) * WIDTH, sums[i][j], n - (at + j) * WIDTH);
}

void FN(multiply)(const T *x, const char *w, T *y, int64_t m, int64_t k, int64_t n) {
#define BLOCK(i, rows, vectors) FN(block)(x + (i) * k, w, y + (i) * n, k, n, at, rows, vectors)
#pragma omp parallel for schedule(static)
    ALL_OUTPUTS(BLOCK)
#undef BLOCK
}

INLINE void FN(block_int8)(const uint8_t *x, const char *w, const float *x_scale, const float *w_scale,
                           const int32_t *w_sum, T *y, int64_t k, int64_t n, int64_t at, const int rows,
                           const int vectors) {
    vector_i32 sums[ROWS][VECTORS];
    tile_int8(x, w + at * (k / 4) * 64, k, rows, vectors, sums);
    UNROLL for (int j = 0; j < vectors; j++) {
        vector scale;
        vector_i32 sum;
        memcpy(&scale, w_scale + (at + j) * WIDTH, sizeof scale);
        memcpy(&sum, w_sum + (at + j) * WIDTH, sizeof sum);
        UNROLL for (int i = 0; i < rows; i++)
            FN(store)(y + i * n + (at + j) * WIDTH,
                      __builtin_convertvector(sums[i][j] - 128 * sum, vector) * (scale * x_scale[i]),
                      n - (at + j) * WIDTH);
    }
}

/* w_scale and w_sum are filled up as W is. Scratch: m floats, then m * k bytes. */
void FN(multiply_int8)(const T *x, const char *w, const float *w_scale, const int32_t *w_sum, T *y, int64_t m,
                       int64_t k, int64_t n, float *scratch) {
    uint8_t *q = (uint8_t *)(scratch + m);
#pragma omp parallel
    {
#pragma omp for
        for (int64_t i = 0; i < m; i++) {
            const T *row = x + i * k;
            float most = 0, bad = 0; /* NaN or Inf in a row make all of its results NaN */
#pragma omp simd reduction(max : most) reduction(+ : bad)
            for (int64_t j = 0; j < k; j++) {
                float value = fabsf(LOAD(row[j]));
                most = value > most ? value : most;
                bad += value - value;
            }
            float inverse = most > 0 ? 127.0f / most : 0;
            scratch[i] = most / 127.0f + bad;
#pragma omp simd
            for (int64_t j = 0; j < k; j++) { /* adding 1.5 · 2^23 rounds to nearest even in the lowest bits */
                number value = {.f = LOAD(row[j]) * inverse + 12582912.0f};
                q[i * k + j] = (uint8_t)(value.u + 128);
            }
        }
#define BLOCK(i, rows, vectors)                                                                                        \
    FN(block_int8)(q + (i) * k, w, scratch + (i), w_scale, w_sum, y + (i) * n, k, n, at, rows, vectors)
#pragma omp for schedule(static)
        ALL_OUTPUTS(BLOCK)
#undef BLOCK
    }
}

#endif
