/* Numbers and vectors of them, for the kernels. A kernel that exists for both activation types includes itself twice. */

#pragma once
#include <math.h>
#include <stdint.h>
#include <string.h>

static inline float from_bf16(uint16_t x) {
    union { uint32_t u; float f; } v = {(uint32_t)x << 16};
    return v.f;
}

static inline uint16_t to_bf16(float x) { /* to nearest even; NaN stays NaN */
    union { float f; uint32_t u; } v = {x};
    uint32_t rounded = (v.u + 0x7fff + ((v.u >> 16) & 1)) >> 16;
    return x != x ? 0x7fc0 : (uint16_t)rounded;
}

static inline float exp_of(float x) { /* relative error below 2e-7; written out so that the compiler vectorises it */
    x = x < -87.0f ? -87.0f : x > 88.0f ? 88.0f : x;
    float n = (x * 1.44269504f + 12582912.0f) - 12582912.0f;
    float r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
    float p = 1.9875691500e-4f;
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    union { int32_t i; float f; } scale = {((int32_t)n + 127) << 23};
    return p * scale.f;
}

#define WIDTH 16
#define MAX_HEAD_DIM 256
typedef float vector __attribute__((vector_size(4 * WIDTH)));
typedef uint32_t vector_u32 __attribute__((vector_size(4 * WIDTH)));
typedef uint16_t vector_u16 __attribute__((vector_size(2 * WIDTH)));

static inline vector_u16 to_bf16s(vector x) { /* what to_bf16 does, 16 at once */
    vector_u32 u = (vector_u32)x, nan = (vector_u32)(x != x);
    u = (u + 0x7fff + ((u >> 16) & 1)) >> 16;
    return __builtin_convertvector((u & ~nan) | (nan & 0x7fc0), vector_u16);
}

static inline float sum_of(vector x) {
    float sum[WIDTH];
    memcpy(sum, &x, sizeof x);
    for (int step = WIDTH / 2; step; step /= 2)
        for (int j = 0; j < step; j++) sum[j] += sum[j + step];
    return sum[0];
}

#define JOIN_(a, b) a##_##b
#define JOIN(a, b) JOIN_(a, b)
#define FN(name) JOIN(name, SUFFIX)
