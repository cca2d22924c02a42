/* What lies between the matrix products in training, forward and backward. Of each step only its inputs are kept; what
   the gradient needs of the way is computed again there, in float32. */

#ifndef T

#include "types.h"

#define T float
#define SUFFIX f32
#include "train.c"
#undef T
#undef SUFFIX

#define T uint16_t
#define SUFFIX bf16
#include "train.c"

#else

/* 1 / sqrt(mean of squares + eps) of x (d). */
INLINE float FN(inverse_norm)(const T *x, int64_t d, float eps) {
    float sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t j = 0; j < d; j++) sum += LOAD(x[j]) * LOAD(x[j]);
    return 1.0f / sqrtf(sum / d + eps);
}

/* out = norm(x) * w, of rows (n, d). `cast_first` rounds before the weight multiplies. */
void FN(norm)(const T *x, const float *w, T *out, int64_t n, int64_t d, float eps, int64_t cast_first) {
#pragma omp parallel for
    for (int64_t i = 0; i < n; i++) {
        const T *from = x + i * d;
        T *to = out + i * d;
        float scale = FN(inverse_norm)(from, d, eps);
        if (cast_first)
#pragma omp simd
            for (int64_t j = 0; j < d; j++) to[j] = STORE(LOAD(STORE(LOAD(from[j]) * scale)) * w[j]);
        else
#pragma omp simd
            for (int64_t j = 0; j < d; j++) to[j] = STORE(LOAD(from[j]) * scale * w[j]);
    }
}

/* by_x = s (g w - x̂ mean(g w x̂)) with s = 1 / sqrt(mean(x²) + eps) and x̂ = s x, for the gradient g of `norm`. */
void FN(norm_backward)(const T *x, const float *w, const T *g, T *by_x, int64_t n, int64_t d, float eps) {
#pragma omp parallel for
    for (int64_t i = 0; i < n; i++) {
        const T *from = x + i * d, *gradient = g + i * d;
        float scale = FN(inverse_norm)(from, d, eps), dot = 0;
#pragma omp simd reduction(+ : dot)
        for (int64_t j = 0; j < d; j++) dot += LOAD(gradient[j]) * w[j] * LOAD(from[j]);
        float along = dot * scale * scale / d;
#pragma omp simd
        for (int64_t j = 0; j < d; j++) by_x[i * d + j] = STORE(scale * (LOAD(gradient[j]) * w[j] - along * LOAD(from[j])));
    }
}

/* out = silu(gate) * up */
void FN(gate)(const T *gate, const T *up, T *out, int64_t count) {
#pragma omp parallel for simd
    for (int64_t j = 0; j < count; j++) {
        float x = LOAD(gate[j]), silu = x < -87.0f ? 0.0f : x / (1.0f + exp_of(-x));
        out[j] = STORE(silu * LOAD(up[j]) + (x - x)); /* x - x is NaN where x is not finite */
    }
}

/* by_up = g silu(gate), by_gate = g up σ(gate) (1 + gate (1 - σ(gate))) */
void FN(gate_backward)(const T *gate, const T *up, const T *g, T *by_gate, T *by_up, int64_t count) {
#pragma omp parallel for simd
    for (int64_t j = 0; j < count; j++) {
        float x = LOAD(gate[j]), gradient = LOAD(g[j]), bad = x - x;
        float sigmoid = x < -87.0f ? 0.0f : 1.0f / (1.0f + exp_of(-x));
        by_up[j] = STORE(gradient * x * sigmoid + bad);
        by_gate[j] = STORE(gradient * LOAD(up[j]) * sigmoid * (1.0f + x * (1.0f - sigmoid)) + bad);
    }
}

/* Heads x (n, h, d) rotated by the rows' angles, or back for `sign` -1; cos and sin of a row are `stride` apart. */
void FN(rotate)(const T *x, const float *cos, const float *sin, int64_t stride, T *out, int64_t n, int64_t h, int64_t d,
                float sign) {
    int64_t half = d / 2;
#pragma omp parallel for
    for (int64_t i = 0; i < n; i++) {
        const float *c = cos + i * stride, *s = sin + i * stride;
        for (int64_t head = 0; head < h; head++) {
            const T *from = x + (i * h + head) * d;
            T *to = out + (i * h + head) * d;
#pragma omp simd
            for (int64_t j = 0; j < half; j++) {
                float low = LOAD(from[j]), high = LOAD(from[j + half]);
                to[j] = STORE(low * c[j] - sign * high * s[j]);
                to[j + half] = STORE(high * c[j + half] + sign * low * s[j + half]);
            }
        }
    }
}

#endif
