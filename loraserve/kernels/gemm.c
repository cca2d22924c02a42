/* y (m, n) = x (m, k) Wᵀ with W laid out once for this, in three widths: float32, bfloat16, and int8, which takes
   activations of either type. A row's result depends on that row alone: its sums run over k in one order, whatever
   stands beside it.

   Layout of W: for each WIDTH outputs in turn, for each `step` inputs in turn, the step weights of each output, 32 bits.
   step is 1, 2 or 4. Outputs are filled up with zeros to a multiple of WIDTH; k is a multiple of 16.

   int8: x is rounded to 8 bits row by row, x = scale (q - 128), and W by output, so
   y = scale · w_scale · (Σ q W - 128 Σ W). */

#ifndef T

#include "tiles.h"
#include "types.h"

#define VECTORS 4 /* vectors of outputs are a task's */
#define CHUNK 256 /* rows of x stay close at hand while all outputs are computed */
#define VECTOR_BYTES (4 * WIDTH)

typedef int32_t vector_i32 __attribute__((vector_size(VECTOR_BYTES)));
typedef union { uint32_t u; float f; } number;

/* Of each width: how many words of x meet 32 bits of W, and which part of these each meets. A word is 32 bits of a row
   of x, made by `prepare` where they are not x itself. */
#define PARTS_f32 1
INLINE vector_u32 part_f32(vector_u32 w, int part) { return w; }
INLINE vector dot_f32(vector sum, vector_u32 x, vector_u32 w) { return add_product(sum, (vector)x, (vector)w); }

#ifdef __AVX512BF16__
#define PARTS_bf16 1
INLINE vector_u32 part_bf16(vector_u32 w, int part) { return w; }
INLINE vector dot_bf16(vector sum, vector_u32 x, vector_u32 w) {
    return (vector)_mm512_dpbf16_ps((__m512)sum, (__m512bh)x, (__m512bh)w);
}
#else /* a word is a float */
#define PARTS_bf16 2
INLINE vector_u32 part_bf16(vector_u32 w, int part) { return part ? w & 0xffff0000 : w << 16; }
INLINE vector dot_bf16(vector sum, vector_u32 x, vector_u32 w) { return add_product(sum, (vector)x, (vector)w); }
#endif

#ifdef __AVX512VNNI__
#define PARTS_int8 1
INLINE uint32_t word_int8(uint32_t x, int part) { return x; }
INLINE vector_u32 part_int8(vector_u32 w, int part) { return w; }
INLINE vector_i32 dot_int8(vector_i32 sum, vector_u32 x, vector_u32 w) {
    __asm__("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(x), "v"(w)); /* no intrinsic, for which gcc 12 copies the sums */
    return sum;
}
#elif defined(__AVX2__) && WIDTH == 8
#define PARTS_int8 2 /* two numbers of 16 bits: of the even inputs, then of the odd ones */
INLINE uint32_t word_int8(uint32_t x, int part) { return x >> (8 * part) & 0x00ff00ff; }
INLINE vector_u32 part_int8(vector_u32 w, int part) {
    return (vector_u32)_mm256_srai_epi16(part ? (__m256i)w : _mm256_slli_epi16((__m256i)w, 8), 8);
}
INLINE vector_i32 dot_int8(vector_i32 sum, vector_u32 x, vector_u32 w) {
    return sum + (vector_i32)_mm256_madd_epi16((__m256i)x, (__m256i)w);
}
#else
#define PARTS_int8 4
INLINE uint32_t word_int8(uint32_t x, int part) { return x >> (8 * part) & 255; }
INLINE vector_u32 part_int8(vector_u32 w, int part) { return (vector_u32)((vector_i32)(w << (24 - 8 * part)) >> 24); }
INLINE vector_i32 dot_int8(vector_i32 sum, vector_u32 x, vector_u32 w) { return sum + (vector_i32)x * (vector_i32)w; }
#endif

/* The sums of `rows` rows of x with `vectors` vectors of outputs, in registers until the end. `steps` is k / step. */
#define TILE(kind, SUM, rows, name, vectors)                                                                           \
    static void tile_##kind##_##rows##_##name(const uint32_t *x, const char *w, int64_t steps, SUM out[]) {            \
        SUM sums[rows][vectors] = {{{0}}};                                                                             \
        for (int64_t p = 0; p < steps; p++)                                                                            \
            UNROLL for (int part = 0; part < PARTS_##kind; part++) {                                                   \
                vector_u32 weights[vectors];                                                                           \
                UNROLL for (int j = 0; j < vectors; j++) {                                                             \
                    memcpy(weights + j, w + (j * steps + p) * VECTOR_BYTES, VECTOR_BYTES);                             \
                    weights[j] = part_##kind(weights[j], part);                                                        \
                }                                                                                                      \
                UNROLL for (int i = 0; i < rows; i++) {                                                                \
                    uint32_t word;                                                                                     \
                    memcpy(&word, x + (i * steps + p) * PARTS_##kind + part, 4);                                       \
                    vector_u32 words = word - (vector_u32){0};                                                         \
                    UNROLL for (int j = 0; j < vectors; j++) sums[i][j] = dot_##kind(sums[i][j], words, weights[j]);   \
                }                                                                                                      \
            }                                                                                                          \
        UNROLL for (int i = 0; i < rows; i++)                                                                          \
            UNROLL for (int j = 0; j < vectors; j++) out[i * VECTORS + j] = sums[i][j];                                \
    }

/* How many vectors of outputs have their sums in registers together with those of 6 rows, and how many rows in int8. */
#if WIDTH == 16
#define AT_ONCE VECTORS
#define ROWS_int8 6
#else
#define AT_ONCE 2
#define ROWS_int8 4
#endif
#define ROWS_f32 6
#define ROWS_bf16 6
#define TILES(kind, SUM)                                                                                               \
    TILE(kind, SUM, 6, some, AT_ONCE)                                                                                  \
    TILE(kind, SUM, 4, some, AT_ONCE)                                                                                  \
    TILE(kind, SUM, 2, all, VECTORS)                                                                                   \
    TILE(kind, SUM, 1, all, VECTORS)                                                                                   \
    TILE(kind, SUM, 6, one, 1)                                                                                         \
    TILE(kind, SUM, 1, one, 1)                                                                                         \
    /* As many rows of at most `left` as a tile takes; returns how many. `configured` is the processor's tiles'. */    \
    static int64_t tile_##kind(const uint32_t *x, const char *w, int64_t steps, int64_t left, int64_t vectors,         \
                               SUM out[], int64_t *configured) {                                                       \
        TRY_TILES_##kind(x, w, steps, left, vectors, out, configured);                                                 \
        int64_t rows = left >= 6 && (vectors == 1 || ROWS_##kind == 6) ? 6 : left >= 4 ? 4 : left >= 2 ? 2 : 1;        \
        if (vectors == 1) return rows == 6 ? (tile_##kind##_6_one(x, w, steps, out), 6)                                \
                                           : (tile_##kind##_1_one(x, w, steps, out), 1);                               \
        if (rows == 2) tile_##kind##_2_all(x, w, steps, out);                                                          \
        if (rows == 1) tile_##kind##_1_all(x, w, steps, out);                                                          \
        for (int64_t j = 0; rows >= 4 && j < VECTORS; j += AT_ONCE)                                                    \
            (rows == 6 ? tile_##kind##_6_some : tile_##kind##_4_some)(x, w + j * steps * VECTOR_BYTES, steps, out + j);\
        return rows;                                                                                                   \
    }
TILES(f32, vector)
TILES(bf16, vector)
TILES(int8, vector_i32)

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

/* The words of x, in scratch where they are not x itself. */
static const uint32_t *prepare_f32(const float *x, int64_t count, float *scratch) { return (const uint32_t *)x; }
static const uint32_t *prepare_bf16(const uint16_t *x, int64_t count, float *scratch) {
    if (PARTS_bf16 == 1) return (const uint32_t *)x;
#pragma omp parallel for simd if (count > 8192)
    for (int64_t j = 0; j < count; j++) scratch[j] = from_bf16(x[j]);
    return (const uint32_t *)scratch;
}

/* For who lays out W. */
int64_t vector_width(void) { return WIDTH; }

#define T float
#define SUFFIX f32
#define STEP 1
#include "gemm.c"
#undef T
#undef SUFFIX
#undef STEP

#define T uint16_t
#define SUFFIX bf16
#define STEP 2
#include "gemm.c"

#else

/* Scratch: m * k floats. */
void FN(multiply)(const T *x, const char *w, T *y, int64_t m, int64_t k, int64_t n, float *scratch) {
    const uint32_t *words = FN(prepare)(x, m * k, scratch);
    int64_t steps = k / STEP;
#pragma omp parallel
    {
        int64_t configured = 0, tasks = tasks_of(n);
#pragma omp for schedule(dynamic)
        for (int64_t task = 0; task < tasks * ((m + CHUNK - 1) / CHUNK); task++) {
            vector sums[ROWS * VECTORS];
            int64_t row = task / tasks * CHUNK, end = row + CHUNK < m ? row + CHUNK : m;
            int64_t vectors, at = block_of(task % tasks, n, &vectors), rows;
            for (; row < end; row += rows) {
                rows = FN(tile)(words + row * steps * FN(PARTS), w + at * steps * VECTOR_BYTES, steps, end - row, vectors, sums,
                                &configured);
                for (int64_t i = 0; i < rows; i++)
                    for (int64_t j = 0; j < vectors; j++)
                        FN(store)(y + (row + i) * n + (at + j) * WIDTH, sums[i * VECTORS + j], n - (at + j) * WIDTH);
            }
        }
        release_tiles(configured);
    }
}

/* w_scale and w_sum are filled up as W is. Scratch: m floats, then m * k bytes, then m * k / 4 words by PARTS. */
void FN(multiply_int8)(const T *x, const char *w, const float *w_scale, const int32_t *w_sum, T *y, int64_t m,
                       int64_t k, int64_t n, float *scratch) {
    uint8_t *q = (uint8_t *)(scratch + m);
    uint32_t *words = PARTS_int8 == 1 ? (uint32_t *)q : (uint32_t *)(q + m * k);
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
            if (PARTS_int8 > 1)
                for (int64_t p = i * k / 4; p < (i + 1) * k / 4; p++) {
                    uint32_t four;
                    memcpy(&four, q + 4 * p, 4);
                    for (int part = 0; part < PARTS_int8; part++) words[p * PARTS_int8 + part] = word_int8(four, part);
                }
        }
        int64_t configured = 0, tasks = tasks_of(n);
#pragma omp for schedule(dynamic)
        for (int64_t task = 0; task < tasks * ((m + CHUNK - 1) / CHUNK); task++) {
            vector_i32 sums[ROWS * VECTORS];
            int64_t row = task / tasks * CHUNK, end = row + CHUNK < m ? row + CHUNK : m;
            int64_t vectors, at = block_of(task % tasks, n, &vectors), rows;
            for (; row < end; row += rows) {
                rows = tile_int8(words + row * k / 4 * PARTS_int8, w + at * k / 4 * VECTOR_BYTES, k / 4, end - row, vectors, sums,
                                 &configured);
                for (int64_t i = 0; i < rows; i++)
                    for (int64_t j = 0; j < vectors; j++) {
                        vector scale, result;
                        vector_i32 sum;
                        memcpy(&scale, w_scale + (at + j) * WIDTH, sizeof scale);
                        memcpy(&sum, w_sum + (at + j) * WIDTH, sizeof sum);
                        sum = sums[i * VECTORS + j] - 128 * sum;
                        result = __builtin_convertvector(sum, vector) * (scale * scratch[row + i]);
                        FN(store)(y + (row + i) * n + (at + j) * WIDTH, result, n - (at + j) * WIDTH);
                    }
            }
        }
        release_tiles(configured);
    }
}

#endif
