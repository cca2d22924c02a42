/* A whole step in which every row attends by itself: the calls that base/fused.py makes, in the same order and so with the same
   bits, without the interpreter between them. For models of few parameters that is a fifth of the time. */

#ifndef T

#include "types.h"

/* Tables that decoder.py fills: all fields are 8 bytes wide. */
typedef struct { /* weights laid out for gemm.c; in float32 or bfloat16 they have no scale and no sum */
    const char *weight;
    const float *scale;
    const int32_t *sum;
    int64_t in, out;
} linear;

typedef struct { /* see add_deltas; no targets: none of the adapters touches this layer */
    int64_t targets;
    const int64_t *widths, *A, *B, *ranks;
    const float *scaling;
    int64_t most;
} deltas;

enum { QKV, OUT, GATE_UP, DOWN, SITES };

typedef struct {
    const float *input_norm, *post_norm, *q_norm, *k_norm;
    linear linears[SITES];
} layer;

typedef struct { /* of the model */
    const layer *layers;
    const float *norm;
    int64_t num_layers, hidden, heads, kv, head_dim, cast_first;
} decoder;

typedef struct { /* of the cache and the step; slots, positions and the rest of `entries` as the kernels have them */
    void *const *cache; /* each layer's keys and values */
    int64_t max_len;
    const int64_t *slots, *positions;
    const float *table;
    const deltas *deltas; /* (layers, SITES), or no adapters */
    int64_t entries;
    const int64_t *entry_rows, *entry_slots;
    const float *entry_weights;
} step;

#define T float
#define SUFFIX f32
#include "decoder.c"
#undef T
#undef SUFFIX

#define T uint16_t
#define SUFFIX bf16
#include "decoder.c"

#else

void FN(add_rms_norm)(float *, const T *, const float *, T *, int64_t, int64_t, float, int64_t);
void FN(norm_and_rotate)(T *, int64_t, int64_t, int64_t, int64_t, int64_t, const float *, const float *, float, int64_t,
                         const float *, const int64_t *);
void FN(store_and_attend)(const T *, const T *, const T *, int64_t, int64_t, int64_t, T *, T *, int64_t, const int64_t *,
                          const int64_t *, int64_t, int64_t, int64_t, int64_t, int64_t, float, T *);
void FN(silu_and_multiply)(const T *, T *, int64_t, int64_t);
void FN(multiply)(const T *, const char *, T *, int64_t, int64_t, int64_t, float *);
void FN(multiply_int8)(const T *, const char *, const float *, const int32_t *, T *, int64_t, int64_t, int64_t, float *);
void FN(add_deltas)(const T *, int64_t, T *, int64_t, int64_t, const int64_t *, const int64_t *, const float *, int64_t,
                    const int64_t *, const int64_t *, const int64_t *, const int64_t *, const float *, int64_t, float *);

/* y (n, out) = x (n, in) Wᵀ and the adapters' deltas. */
static void FN(apply)(const linear *l, const deltas *d, const step *s, const T *x, T *y, int64_t n, float *scratch) {
    if (l->scale) FN(multiply_int8)(x, l->weight, l->scale, l->sum, y, n, l->in, l->out, scratch);
    else FN(multiply)(x, l->weight, y, n, l->in, l->out, scratch);
    if (d && d->targets)
        FN(add_deltas)(x, l->in, y, l->out, s->entries, s->entry_rows, s->entry_slots, s->entry_weights, d->targets,
                       d->widths, d->A, d->B, d->ranks, d->scaling, d->most, scratch);
}

/* x (n, hidden) float32 holds the embedded tokens, and in the end the residual stream; y (n, hidden) gets its norm.
   Buffers of rows, each as wide as the widest layer's: `inner` two of n, `scratch` what the kernels above ask for. */
void FN(decode)(const decoder *m, const step *s, float *x, T *y, T *inner, int64_t widest, float *scratch, int64_t n,
                float eps, float scale) {
    T *wide = inner, *narrow = inner + n * widest;
    int64_t h = m->heads, kv = m->kv, d = m->head_dim, hidden = m->hidden;
    for (int64_t i = 0; i < m->num_layers; i++) {
        const layer *l = m->layers + i;
        const linear *linears = l->linears;
        const deltas *sites = s->deltas ? s->deltas + i * SITES : 0;
#define APPLY(site, from, to) FN(apply)(linears + site, sites ? sites + site : 0, s, from, to, n, scratch)
        FN(add_rms_norm)(x, i ? y : 0, l->input_norm, narrow, n, hidden, eps, m->cast_first);
        APPLY(QKV, narrow, wide);
        int64_t stride = linears[QKV].out;
        const T *k = wide + h * d, *v = k + kv * d;
        FN(norm_and_rotate)(wide, n, stride, h, kv, d, l->q_norm, l->k_norm, eps, m->cast_first, s->table, s->positions);
        FN(store_and_attend)(wide, k, v, stride, stride, stride, s->cache[2 * i], s->cache[2 * i + 1], s->max_len,
                             s->slots, s->positions, n, n, h, kv, d, scale, narrow);
        APPLY(OUT, narrow, y);
        FN(add_rms_norm)(x, y, l->post_norm, narrow, n, hidden, eps, m->cast_first);
        APPLY(GATE_UP, narrow, wide);
        FN(silu_and_multiply)(wide, narrow, n, linears[DOWN].in);
        APPLY(DOWN, narrow, y);
#undef APPLY
    }
    FN(add_rms_norm)(x, y, m->norm, narrow, n, hidden, eps, m->cast_first);
    memcpy(y, narrow, n * hidden * sizeof(T));
}

#endif
