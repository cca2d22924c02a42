/* The deltas of a batch's adapters, see lora/batch.py. Every function exists for float32 and for bfloat16 activations and
   adapters; sums are float32, each in one order whatever stands beside it. */

#ifndef T

#include "types.h"
#include <omp.h>

#define ROWS 4              /* by */
#if WIDTH == 16             /* so many sums stay in registers */
#define MANY 4
#else
#define MANY 2
#endif
#define RANKS 8             /* rows of A are one task's */
#define CHUNK 64            /* rows of x meet them while they are close at hand */

#define T float
#define SUFFIX f32
#include "lora.c"
#undef T
#undef SUFFIX

#define T uint16_t
#define SUFFIX bf16
#include "lora.c"

#else

#define MEET(m, n, load)                                                                                               \
    {                                                                                                                  \
        vector rows[n];                                                                                                \
        UNROLL for (int j = 0; j < n; j++) {                                                                           \
            rows[j] = load(a + j * in + at);                                                                           \
            __builtin_prefetch(a + (j + n) * in + at); /* the rows that come next */                                   \
        }                                                                                                              \
        UNROLL for (int i = 0; i < m; i++) {                                                                           \
            vector input = load(x[i] + at);                                                                            \
            UNROLL for (int j = 0; j < n; j++) parts[i][j] = FN(meet)(parts[i][j], input, rows[j]);                    \
        }                                                                                                              \
    }
/* sums[i * n + j] = x[i] · a[j], for m rows of x and n rows of a (n, in). Sums of 16 stay in registers to the end. */
#define DOT(m, name, n)                                                                                                \
    static void FN(dot_##m##_##name)(const T *const *x, const T *a, int64_t in, float *sums) {                         \
        vector parts[m][n] = {{{0}}};                                                                                  \
        int64_t at = 0;                                                                                                \
        for (; at + FN(SPAN) <= in; at += FN(SPAN)) MEET(m, n, FN(span))                                               \
        for (; at + WIDTH <= in; at += WIDTH) MEET(m, n, FN(half))                                                     \
        UNROLL for (int i = 0; i < m; i++)                                                                             \
            UNROLL for (int j = 0; j < n; j++) {                                                                       \
                float sum = sum_of(parts[i][j]);                                                                       \
                for (int64_t k = at; k < in; k++) sum = fmaf(LOAD(x[i][k]), LOAD(a[j * in + k]), sum);                 \
                sums[i * n + j] = sum;                                                                                 \
            }                                                                                                          \
    }
DOT(4, many, MANY)
DOT(2, many, MANY)
DOT(1, many, MANY)
DOT(4, one, 1)
DOT(2, one, 1)
DOT(1, one, 1)
#undef DOT
#undef MEET

/* y[i] += h[i] Bᵀ, for m rows of n vectors; a row of Bᵀ has `width` numbers, h[i] has r. */
#define EXPAND(m, name, n)                                                                                             \
    static void FN(expand_##m##_##name)(T *const *y, const float *const *h, const T *b, int64_t r, int64_t width) {    \
        vector sums[m][n];                                                                                             \
        UNROLL for (int i = 0; i < m; i++)                                                                             \
            UNROLL for (int j = 0; j < n; j++) sums[i][j] = FN(load)(y[i] + j * WIDTH);                                \
        for (int64_t k = 0; k < r; k++) {                                                                              \
            vector columns[n];                                                                                         \
            UNROLL for (int j = 0; j < n; j++) {                                                                       \
                columns[j] = FN(load)(b + k * width + j * WIDTH);                                                      \
                __builtin_prefetch(b + k * width + (j + 2 * n) * WIDTH); /* the columns after the next */              \
            }                                                                                                          \
            UNROLL for (int i = 0; i < m; i++)                                                                         \
                UNROLL for (int j = 0; j < n; j++)                                                                     \
                    sums[i][j] = add_product(sums[i][j], h[i][k] - (vector){0}, columns[j]);                           \
        }                                                                                                              \
        UNROLL for (int i = 0; i < m; i++)                                                                             \
            UNROLL for (int j = 0; j < n; j++) FN(store)(y[i] + j * WIDTH, sums[i][j], WIDTH);                         \
    }
EXPAND(4, many, MANY)
EXPAND(2, many, MANY)
EXPAND(1, many, MANY)
EXPAND(4, one, 1)
EXPAND(2, one, 1)
EXPAND(1, one, 1)
#undef EXPAND

/* As many of `left` rows as one call takes. */
#define ROWS_OF(left) ((left) >= ROWS ? ROWS : (left) >= 2 ? 2 : 1)
#define CALL(name, m, n, ...)                                                                                          \
    (n == MANY ? (m == 4 ? FN(name##_4_many) : m == 2 ? FN(name##_2_many) : FN(name##_1_many))                         \
               : (m == 4 ? FN(name##_4_one) : m == 2 ? FN(name##_2_one) : FN(name##_1_one)))(__VA_ARGS__)

/* y (n, width) += weight * scaling * B (A x) for entries (row, slot, weight), sorted by slot; targets stand side by side.
   A and B hold pointers (slots, targets): to A (r, in), and to B transposed, (r, out). An absent target has r = 0.
   scratch: entries * targets * most floats, an even number, and entries + 1 int64. */
void FN(add_deltas)(const T *x, int64_t in, T *y, int64_t width, int64_t entries, const int64_t *rows,
                    const int64_t *slots, const float *weights, int64_t targets, const int64_t *widths,
                    const int64_t *A, const int64_t *B, const int64_t *ranks, const float *scaling, int64_t most,
                    float *hidden) {
    int64_t parts = (most + RANKS - 1) / RANKS, chunks = 0;
    int64_t *starts = (int64_t *)(hidden + (entries * targets * most + 1) / 2 * 2); /* of chunks of one slot's entries */
    for (int64_t e = 0; e < entries; e++)
        if (e == 0 || slots[e] != slots[e - 1] || e - starts[chunks - 1] == CHUNK) starts[chunks++] = e;
    starts[chunks] = entries;
#pragma omp parallel
    {
#pragma omp for schedule(static)
        for (int64_t task = 0; task < chunks * targets * parts; task++) {
            int64_t chunk = task / (targets * parts), t = task / parts % targets, first = task % parts * RANKS;
            int64_t at = slots[starts[chunk]] * targets + t;
            int64_t last = first + RANKS < ranks[at] ? first + RANKS : ranks[at];
            for (int64_t e = starts[chunk], m; e < starts[chunk + 1]; e += m) {
                const T *inputs[ROWS];
                float sums[ROWS * MANY];
                m = ROWS_OF(starts[chunk + 1] - e);
                for (int64_t i = 0; i < m; i++) inputs[i] = x + rows[e + i] * in;
                for (int64_t r = first, n; r < last; r += n) {
                    n = last - r >= MANY ? MANY : 1;
                    CALL(dot, m, n, inputs, (const T *)A[at] + r * in, in, sums);
                    for (int64_t i = 0; i < m; i++)
                        for (int64_t j = 0; j < n; j++)
                            hidden[((e + i) * targets + t) * most + r + j] = sums[i * n + j] * weights[e + i] * scaling[at];
                }
            }
        }
        int64_t threads = omp_get_num_threads(), thread = omp_get_thread_num();
        for (int64_t t = 0, left = 0; t < targets; left += widths[t++]) { /* each thread has columns of its own */
            int64_t share = (widths[t] + threads * 64 - 1) / (threads * 64) * 64, from = thread * share;
            int64_t to = from + share < widths[t] ? from + share : widths[t];
            for (int64_t chunk = 0; chunk < chunks; chunk++) {
                int64_t at = slots[starts[chunk]] * targets + t, r = ranks[at];
                for (int64_t e = starts[chunk], m; r && e < starts[chunk + 1]; e += m) {
                    m = ROWS_OF(starts[chunk + 1] - e);
                    const float *h[ROWS];
                    T *outputs[ROWS];
                    for (int64_t i = 0; i < m; i++) h[i] = hidden + ((e + i) * targets + t) * most;
                    int64_t column = from;
                    for (int64_t n; column + WIDTH <= to; column += n * WIDTH) {
                        n = to - column >= MANY * WIDTH ? MANY : 1;
                        for (int64_t i = 0; i < m; i++) outputs[i] = y + rows[e + i] * width + left + column;
                        CALL(expand, m, n, outputs, h, (const T *)B[at] + column, r, widths[t]);
                    }
                    for (; column < to; column++)
                        for (int64_t i = 0; i < m; i++) {
                            T *output = y + rows[e + i] * width + left + column;
                            float sum = LOAD(*output);
                            for (int64_t k = 0; k < r; k++) sum = fmaf(h[i][k], LOAD(((const T *)B[at])[k * widths[t] + column]), sum);
                            *output = STORE(sum);
                        }
                }
            }
        }
    }
}
#undef ROWS_OF
#undef CALL

#endif
