/* Numbers and vectors of them, for the kernels. A kernel that exists for both activation types includes itself twice. */

#pragma once
#ifdef __AVX2__
#include <immintrin.h>
#endif
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#define INLINE static inline __attribute__((always_inline))
#define UNROLL _Pragma("GCC unroll 8")

static inline float from_f32(float x) { return x; }
static inline float to_f32(float x) { return x; }

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

/* Numbers of 32 bits in a vector: what a register of this processor holds. */
#ifdef __AVX512F__
#define WIDTH 16
#else
#define WIDTH 8
#endif
#define MAX_HEAD_DIM 256
typedef float vector __attribute__((vector_size(4 * WIDTH)));
typedef uint32_t vector_u32 __attribute__((vector_size(4 * WIDTH)));
typedef uint16_t vector_u16 __attribute__((vector_size(2 * WIDTH)));

/* 16 bits of each to 32 and back; gcc 12 needs five instructions where the processor has one or two. */
static inline vector_u32 widened(vector_u16 x) {
#if defined(__AVX512F__)
    return (vector_u32)_mm512_cvtepu16_epi32((__m256i)x);
#elif defined(__AVX2__)
    return (vector_u32)_mm256_cvtepu16_epi32((__m128i)x);
#else
    return __builtin_convertvector(x, vector_u32);
#endif
}

static inline vector_u16 narrowed(vector_u32 x) {
#if defined(__AVX512F__)
    return (vector_u16)_mm512_cvtepi32_epi16((__m512i)x);
#elif defined(__AVX2__)
    return (vector_u16)_mm_packus_epi32(_mm256_castsi256_si128((__m256i)x), _mm256_extracti128_si256((__m256i)x, 1));
#else
    return __builtin_convertvector(x, vector_u16);
#endif
}

static inline vector_u16 to_bf16s(vector x) { /* what to_bf16 does, of a whole vector; numbers below 2^-126 may be 0 */
#ifdef __AVX512BF16__
    return (vector_u16)_mm512_cvtneps_pbh((__m512)x);
#else
    vector_u32 u = (vector_u32)x, nan = (vector_u32)(x != x);
    u = (u + 0x7fff + ((u >> 16) & 1)) >> 16;
    return narrowed((u & ~nan) | (nan & 0x7fc0));
#endif
}

static inline vector load_f32(const float *x) {
    vector v;
    memcpy(&v, x, sizeof v);
    return v;
}

static inline vector load_bf16(const uint16_t *x) {
    vector_u16 v;
    memcpy(&v, x, sizeof v);
    return (vector)(widened(v) << 16);
}

/* The first `count` of a vector, all if it has no more. */
static inline void store_f32(float *y, vector x, int64_t count) {
    memcpy(y, &x, (count < WIDTH ? count : WIDTH) * sizeof *y);
}

static inline void store_bf16(uint16_t *y, vector x, int64_t count) {
    vector_u16 v = to_bf16s(x);
    memcpy(y, &v, (count < WIDTH ? count : WIDTH) * sizeof *y);
}

/* sum + x * w, rounded once where the processor can: said outright, for the compiler does so here and not there. */
INLINE vector add_product(vector sum, vector x, vector w) {
#if defined(__AVX512F__)
    return (vector)_mm512_fmadd_ps((__m512)x, (__m512)w, (__m512)sum);
#elif defined(__FMA__) && WIDTH == 8
    return (vector)_mm256_fmadd_ps((__m256)x, (__m256)w, (__m256)sum);
#else
    return sum + x * w;
#endif
}

/* A dot product in pieces of SPAN numbers, the last one perhaps of WIDTH: `meet` adds what two pieces make to the sums. */
#define SPAN_f32 WIDTH
INLINE vector span_f32(const float *x) { return load_f32(x); }
INLINE vector half_f32(const float *x) { return load_f32(x); }
INLINE vector meet_f32(vector sum, vector x, vector y) { return add_product(sum, x, y); }
#ifdef __AVX512BF16__ /* pairs of numbers */
#define SPAN_bf16 (2 * WIDTH)
INLINE vector span_bf16(const uint16_t *x) { return (vector)_mm512_loadu_si512(x); }
INLINE vector half_bf16(const uint16_t *x) {
    return (vector)_mm512_zextsi256_si512(_mm256_loadu_si256((const __m256i *)x));
}
INLINE vector meet_bf16(vector sum, vector x, vector y) {
    return (vector)_mm512_dpbf16_ps((__m512)sum, (__m512bh)x, (__m512bh)y);
}
#else
#define SPAN_bf16 WIDTH
INLINE vector span_bf16(const uint16_t *x) { return load_bf16(x); }
INLINE vector half_bf16(const uint16_t *x) { return load_bf16(x); }
INLINE vector meet_bf16(vector sum, vector x, vector y) { return add_product(sum, x, y); }
#endif
#define PIECE_f32(x, j, count) span_f32((x) + (j) * SPAN_f32)
#define PIECE_bf16(x, j, count)                                                                                        \
    (((j) + 1) * SPAN_bf16 <= (count) ? span_bf16((x) + (j) * SPAN_bf16) : half_bf16((x) + (j) * SPAN_bf16))

static inline float sum_of(vector x) {
#ifdef __AVX512F__
    return _mm512_reduce_add_ps((__m512)x);
#else
    float sum[WIDTH];
    memcpy(sum, &x, sizeof x);
    for (int step = WIDTH / 2; step; step /= 2)
        for (int j = 0; j < step; j++) sum[j] += sum[j + step];
    return sum[0];
#endif
}

/* What depends on the type T of activations, whose SUFFIX is f32 or bf16. */
#define JOIN_(a, b) a##_##b
#define JOIN(a, b) JOIN_(a, b)
#define FN(name) JOIN(name, SUFFIX)
#define LOAD(x) FN(from)(x)
#define STORE(x) FN(to)(x)
