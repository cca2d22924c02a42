/* What lies between the matrix products of a decoding step, for a CPU. `cpu.py` compiles and calls it.

   Every function exists for float32 and for bfloat16 activations (suffix _f32, _bf16); sums are float32. A row's result
   depends on that row alone, never on its neighbours or on the number of threads; only the roundings of a blend follow
   the order of its entries. */

#ifndef T

#include "types.h"

/* Queries of one key head that read its past together: as many as registers hold. */
#if WIDTH == 16
#define QUERIES 2
#else
#define QUERIES 1
#endif

#define AHEAD 16 /* tokens */

#define T float
#define SUFFIX f32
#include "cpu.c"
#undef T
#undef SUFFIX

#define T uint16_t
#define SUFFIX bf16
#include "cpu.c"

#else

/* x (n, d) float32 += y (n, d), if y is given; out = norm(x) * w. `cast_first` rounds before the weight multiplies. */
void FN(add_rms_norm)(float *x, const T *y, const float *w, T *out, int64_t n, int64_t d, float eps, int64_t cast_first) {
#pragma omp parallel for if (n > 1)
    for (int64_t i = 0; i < n; i++) {
        float *row = x + i * d, sum = 0;
        T *to = out + i * d;
        if (y)
#pragma omp simd
            for (int64_t j = 0; j < d; j++) row[j] += LOAD(y[i * d + j]);
#pragma omp simd reduction(+ : sum)
        for (int64_t j = 0; j < d; j++) sum += row[j] * row[j];
        float scale = 1.0f / sqrtf(sum / d + eps);
        if (cast_first)
#pragma omp simd
            for (int64_t j = 0; j < d; j++) to[j] = STORE(LOAD(STORE(row[j] * scale)) * w[j]);
        else
#pragma omp simd
            for (int64_t j = 0; j < d; j++) to[j] = STORE(row[j] * scale * w[j]);
    }
}

/* In place: heads of rows of `stride`, the first h of them queries and the next kv keys, are normed and rotated.
   table (positions, 2, d) holds cos and sin; norms may be absent. */
void FN(norm_and_rotate)(T *qkv, int64_t n, int64_t stride, int64_t h, int64_t kv, int64_t d, const float *q_norm,
                         const float *k_norm, float eps, int64_t cast_first, const float *table, const int64_t *positions) {
#pragma omp parallel for if (n > 1)
    for (int64_t i = 0; i < n; i++) {
        const float *cos = table + positions[i] * 2 * d, *sin = cos + d;
        for (int64_t head = 0; head < h + kv; head++) {
            T *x = qkv + i * stride + head * d;
            const float *w = head < h ? q_norm : k_norm;
            float v[MAX_HEAD_DIM];
#pragma omp simd
            for (int64_t j = 0; j < d; j++) v[j] = LOAD(x[j]);
            if (w) {
                float sum = 0;
#pragma omp simd reduction(+ : sum)
                for (int64_t j = 0; j < d; j++) sum += v[j] * v[j];
                float scale = 1.0f / sqrtf(sum / d + eps);
                if (cast_first)
#pragma omp simd
                    for (int64_t j = 0; j < d; j++) v[j] = LOAD(STORE(LOAD(STORE(v[j] * scale)) * w[j]));
                else
#pragma omp simd
                    for (int64_t j = 0; j < d; j++) v[j] = LOAD(STORE(v[j] * scale * w[j]));
            }
            int64_t half = d / 2;
#pragma omp simd
            for (int64_t j = 0; j < half; j++) {
                x[j] = STORE(v[j] * cos[j] - v[j + half] * sin[j]);
                x[j + half] = STORE(v[j + half] * cos[j + half] + v[j] * sin[j + half]);
            }
        }
    }
}

/* `queries` of one key head (queries, d) over its past (length, d), d of `lanes` vectors; out (queries, d), scores
   (queries, length). */
INLINE void FN(attend)(const T *q, const T *past_k, const T *past_v, int64_t length, const int64_t queries,
                       const int64_t lanes, float scale, T *out, float *scores) {
    const int64_t d = lanes * WIDTH, pieces = (d + FN(SPAN) - 1) / FN(SPAN);
    vector query[QUERIES][MAX_HEAD_DIM / WIDTH], sum[QUERIES][MAX_HEAD_DIM / WIDTH];
    for (int64_t g = 0; g < queries; g++)
        for (int64_t j = 0; j < pieces; j++) query[g][j] = FN(PIECE)(q + g * d, j, d);
    for (int64_t t = 0; t < length; t++) {
        vector dot[QUERIES] = {{0}};
        for (int64_t j = 0; j < d * (int64_t)sizeof(T); j += 64) { /* what the next steps read comes from afar */
            __builtin_prefetch((const char *)(past_k + (t + AHEAD) * d) + j);
            __builtin_prefetch((const char *)(past_v + t * d) + j);
        }
        for (int64_t j = 0; j < pieces; j++) {
            vector key = FN(PIECE)(past_k + t * d, j, d);
            for (int64_t g = 0; g < queries; g++) dot[g] = FN(meet)(dot[g], query[g][j], key);
        }
        for (int64_t g = 0; g < queries; g++) scores[g * length + t] = sum_of(dot[g]) * scale;
    }
    float total[QUERIES] = {0};
    for (int64_t g = 0; g < queries; g++) {
        float *score = scores + g * length, most = score[0], all = 0;
#pragma omp simd reduction(max : most)
        for (int64_t t = 0; t < length; t++) most = score[t] > most ? score[t] : most;
#pragma omp simd reduction(+ : all)
        for (int64_t t = 0; t < length; t++) {
            float bad = score[t] - score[t]; /* NaN for NaN and Inf, which exp_of would hide */
            score[t] = exp_of(score[t] - most) + bad;
            all += score[t];
        }
        total[g] = all;
        for (int64_t j = 0; j < lanes; j++) sum[g][j] = (vector){0};
    }
    for (int64_t t = 0; t < length; t++)
        for (int64_t j = 0; j < lanes; j++) {
            vector value = FN(load)(past_v + t * d + j * WIDTH);
            for (int64_t g = 0; g < queries; g++)
                sum[g][j] = add_product(sum[g][j], scores[g * length + t] - (vector){0}, value);
        }
    for (int64_t g = 0; g < queries; g++)
        for (int64_t j = 0; j < lanes; j++) FN(store)(out + g * d + j * WIDTH, sum[g][j] / total[g], WIDTH);
}

/* Store the keys and values of n rows in their slots; then attend for the first `decoding` rows, each by itself.
   Cache (slots, kv, max_len, d); q, k, v are heads of rows of their strides; out (n, h, d). */
void FN(store_and_attend)(const T *q, const T *k, const T *v, int64_t q_stride, int64_t k_stride,
                          int64_t v_stride, T *keys, T *values, int64_t max_len,
                          const int64_t *slots, const int64_t *positions, int64_t n, int64_t decoding, int64_t h,
                          int64_t kv, int64_t d, float scale, T *out) {
    int64_t group = h / kv;
#pragma omp parallel for if (n > 1)
    for (int64_t i = 0; i < n; i++)
        for (int64_t head = 0; head < kv; head++) {
            int64_t at = ((slots[i] * kv + head) * max_len + positions[i]) * d;
            memcpy(keys + at, k + i * k_stride + head * d, d * sizeof(T));
            memcpy(values + at, v + i * v_stride + head * d, d * sizeof(T));
        }
#define ATTEND(lanes)                                                                                                  \
    for (int64_t g = head * group, end = g + group; g < end;) {                                                        \
        const T *query = q + i * q_stride + g * d;                                                                     \
        T *to = out + (i * h + g) * d;                                                                                 \
        if (QUERIES > 1 && end - g > 1) {                                                                              \
            FN(attend)(query, past_k, past_v, length, QUERIES, lanes, scale, to, scores);                              \
            g += QUERIES;                                                                                              \
        } else {                                                                                                       \
            FN(attend)(query, past_k, past_v, length, 1, lanes, scale, to, scores);                                    \
            g++;                                                                                                       \
        }                                                                                                              \
    }
    int64_t longest = 1;
    for (int64_t i = 0; i < decoding; i++) longest = positions[i] >= longest ? positions[i] + 1 : longest;
#pragma omp parallel if (decoding * kv > 1)
    {
        float *scores = malloc(QUERIES * longest * sizeof *scores);
#pragma omp for schedule(dynamic)
        for (int64_t task = 0; task < decoding * kv; task++) {
            int64_t i = task / kv, head = task % kv, length = positions[i] + 1;
            const T *past_k = keys + (slots[i] * kv + head) * max_len * d;
            const T *past_v = values + (slots[i] * kv + head) * max_len * d;
            switch (d) { /* of a constant width all vectors stay in registers */
            case 64: ATTEND(64 / WIDTH) break;
            case 80: ATTEND(80 / WIDTH) break;
            case 96: ATTEND(96 / WIDTH) break;
            case 128: ATTEND(128 / WIDTH) break;
            default: ATTEND(d / WIDTH)
            }
        }
        free(scores);
    }
#undef ATTEND
}

/* out (n, d) = silu(gate) * up, with gate and up side by side in rows of 2d. */
void FN(silu_and_multiply)(const T *gate_up, T *out, int64_t n, int64_t d) {
#pragma omp parallel for collapse(2) if (n * d > 8192)
    for (int64_t i = 0; i < n; i++)
        for (int64_t block = 0; block < d; block += 512) {
            const T *gate = gate_up + i * 2 * d, *up = gate + d;
            int64_t end = block + 512 < d ? block + 512 : d;
#pragma omp simd
            for (int64_t j = block; j < end; j++) {
                float x = LOAD(gate[j]);
                float silu = x < -87.0f ? 0.0f : x / (1.0f + exp_of(-x));
                out[i * d + j] = STORE(silu * LOAD(up[j]) + (x - x)); /* x - x is NaN where x is not finite */
            }
        }
}

#endif
