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
    UNROLL for (int bit = 0; bit < 32; bit += 8)
        sum += (int32_t)(x >> bit & 255) * ((vector_i32)(w << (24 - bit)) >> 24);
#endif
    return sum;
}

/* The sums of `rows` rows of x with `vectors` vectors of outputs, in registers until the end. */
#define TILE(kind, X, step, SUM, rows, vectors)                                                                        \
    static void tile_##kind##_##rows##_##vectors(const X *x, const char *w, int64_t k, SUM out[]) {                    \
        SUM sums[rows][vectors] = {{{0}}};                                                                             \
        for (int64_t p = 0; p < k / step; p++) {                                                                       \
            vector_u32 weights[vectors];                                                                               \
            UNROLL for (int j = 0; j < vectors; j++) memcpy(weights + j, w + (j * (k / step) + p) * 64, 64);           \
            UNROLL for (int i = 0; i < rows; i++) {                                                                    \
                uint32_t inputs;                                                                                       \
                memcpy(&inputs, x + i * k + p * step, 4);                                                              \
                UNROLL for (int j = 0; j < vectors; j++) sums[i][j] = dot_##kind(sums[i][j], inputs, weights[j]);      \
            }                                                                                                          \
        }                                                                                                              \
        UNROLL for (int i = 0; i < rows; i++)                                                                          \
            UNROLL for (int j = 0; j < vectors; j++) out[i * vectors + j] = sums[i][j];                                \
    }
#define TILES(kind, X, step, SUM)                                                                                      \
    TILE(kind, X, step, SUM, 6, 4)                                                                                     \
    TILE(kind, X, step, SUM, 4, 4)                                                                                     \
    TILE(kind, X, step, SUM, 2, 4)                                                                                     \
    TILE(kind, X, step, SUM, 1, 4)                                                                                     \
    TILE(kind, X, step, SUM, 6, 1)                                                                                     \
    TILE(kind, X, step, SUM, 1, 1)                                                                                     \
    /* As many rows of at most `left` as a tile takes; returns how many. */                                            \
    static int64_t tile_##kind(const X *x, const char *w, int64_t k, int64_t left, int64_t vectors, SUM out[]) {       \
        if (vectors == 1 && left >= 6) return tile_##kind##_6_1(x, w, k, out), 6;                                      \
        if (vectors == 1) return tile_##kind##_1_1(x, w, k, out), 1;                                                   \
        if (left >= 6) return tile_##kind##_6_4(x, w, k, out), 6;                                                      \
        if (left >= 4) return tile_##kind##_4_4(x, w, k, out), 4;                                                      \
        if (left >= 2) return tile_##kind##_2_4(x, w, k, out), 2;                                                      \
        return tile_##kind##_1_4(x, w, k, out), 1;                                                                     \
    }
TILES(f32, float, 1, vector)
TILES(bf16, uint16_t, 2, vector)
TILES(int8, uint8_t, 4, vector_i32)

/* Blocks of outputs: task -> first vector and number of vectors, VECTORS while there are as many, then one by one. */
INLINE int64_t tasks_of(int64_t n) {
    int64_t vectors = (n + WIDTH - 1) / WIDTH;
    return vectors / VECTORS + vectors % VECTORS;
}
INLINE int64_t block_of(int64_t task, int64_t n, int64_t *vectors) {
    int64_t whole = (n + WIDTH - 1) / WIDTH / VECTORS;
    *vectors = task < whole ? VECTORS : 1;
    return task < whole ? task * VECTORS : whole * VECTORS + task - whole;
}

#define T float
#define SUFFIX f32
#define STEP 1
#define LOAD(x) (x)
#define STORED vector
#define STORE_VECTOR(x) (x)
#include "gemm.c"
#undef T
#undef SUFFIX
#undef STEP
#undef LOAD
#undef STORED
#undef STORE_VECTOR

#define T uint16_t
#define SUFFIX bf16
#define STEP 2
#define LOAD(x) from_bf16(x)
#define STORED vector_u16
#define STORE_VECTOR(x) to_bf16s(x)
#include "gemm.c"

#else

INLINE void FN(store)(T *y, const vector *sum, int64_t count) {
    STORED numbers = STORE_VECTOR(*sum);
    memcpy(y, &numbers, (count < WIDTH ? count : WIDTH) * sizeof(T));
}

void FN(multiply)(const T *x, const char *w, T *y, int64_t m, int64_t k, int64_t n) {
#pragma omp parallel for schedule(static)
    for (int64_t task = 0; task < tasks_of(n); task++) {
        vector sums[ROWS * VECTORS];
        int64_t vectors, at = block_of(task, n, &vectors), rows;
        for (int64_t row = 0; row < m; row += rows) {
            rows = FN(tile)(x + row * k, w + at * (k / STEP) * 64, k, m - row, vectors, sums);
            for (int64_t i = 0; i < rows; i++)
                for (int64_t j = 0; j < vectors; j++)
                    FN(store)(y + (row + i) * n + (at + j) * WIDTH, sums + i * vectors + j, n - (at + j) * WIDTH);
        }
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
#pragma omp for schedule(static)
        for (int64_t task = 0; task < tasks_of(n); task++) {
            vector_i32 sums[ROWS * VECTORS];
            int64_t vectors, at = block_of(task, n, &vectors), rows;
            for (int64_t row = 0; row < m; row += rows) {
                rows = tile_int8(q + row * k, w + at * (k / 4) * 64, k, m - row, vectors, sums);
                for (int64_t i = 0; i < rows; i++)
                    for (int64_t j = 0; j < vectors; j++) {
                        vector scale, result;
                        vector_i32 sum;
                        memcpy(&scale, w_scale + (at + j) * WIDTH, sizeof scale);
                        memcpy(&sum, w_sum + (at + j) * WIDTH, sizeof sum);
                        sum = sums[i * vectors + j] - 128 * sum;
                        result = __builtin_convertvector(sum, vector) * (scale * scratch[row + i]);
                        FN(store)(y + (row + i) * n + (at + j) * WIDTH, &result, n - (at + j) * WIDTH);
                    }
            }
        }
    }
}

#endif
