/* The training step of running batch norm on a CPU: the equations of reference.py in two calls, forward and backward.

   fastrbn/native/ compiles this file on first use, with -DREAL=float or -DREAL=double. It needs only libc and POSIX threads.

   Activations have one of two layouts. `rows`: (N, C, P), the P positions of a channel are contiguous. `columns`: (R, W) with
   W = C·fold columns, where `fold` neighbours belong to one channel; channels_last has fold 1, and (N, C, P) with few
   positions is treated as (N, C·P) with fold P.

   Sums are in REAL over a row or a block of rows, then in double. Variances are summed around a guess of the mean; if the
   guess turns out to be more than 4 deviations off, they are summed again around the mean itself. */

#define _DEFAULT_SOURCE /* for madvise */
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#include "native_threads.h"

#define BLOCK 128 /* in `columns`: rows summed in REAL before the sum moves on in double */
#define HUGE_PAGE ((size_t)2 << 20)

typedef struct {
  int64_t outer; /* rows: N; columns: R */
  int64_t channels;
  int64_t inner; /* rows: P; columns: fold */
  int64_t columns; /* 1 for `columns`, 0 for `rows` */
  int64_t per_sample; /* columns: rows per sample; rows: unused */
  int64_t k, every; /* the statistics read k samples: 0, every, 2·every, … */
} Layout;

/* Writing to a new large output causes a page fault per page; ask for large pages to have fewer. */
static void large_pages(void *p, size_t bytes) {
#ifdef MADV_HUGEPAGE
  const uintptr_t mask = ~(uintptr_t)(HUGE_PAGE - 1), begin = ((uintptr_t)p + HUGE_PAGE - 1) & mask;
  const uintptr_t end = ((uintptr_t)p + bytes) & mask;
  if (end > begin) madvise((void *)begin, end - begin, MADV_HUGEPAGE);
#else
  (void)p, (void)bytes;
#endif
}

static int64_t width(const Layout *l) { return l->columns ? l->channels * l->inner : l->channels; }
/* Elements per channel, and how many of them the statistics read. */
static int64_t elements(const Layout *l) { return l->outer * l->inner; }
static int64_t elements_read(const Layout *l) { return l->k * l->inner * (l->columns ? l->per_sample : 1); }

/* ---- sums: of (x − s) and (x − s)² over the samples read, or of dy and dy·(x − s) over all ---- */

typedef struct {
  const Layout *l;
  const REAL *x, *dy; /* dy is NULL for the first kind */
  const REAL *s;      /* one value per channel (rows) or per column (columns) */
  double *sums;       /* (threads, 2, width) */
} Sums;

static void sum_rows(const void *arguments, int64_t begin, int64_t end, int thread) {
  const Sums *a = arguments;
  const Layout *l = a->l;
  const int64_t c = l->channels, p = l->inner, n = a->dy ? l->outer : l->k, step = a->dy ? 1 : l->every;
  double *first = a->sums, *second = a->sums + c; /* shared by all threads, which have different channels */
  for (int64_t j = begin; j < end; j++) first[j] = second[j] = 0;
  for (int64_t i = 0; i < n; i++)
    for (int64_t j = begin; j < end; j++) {
      const REAL s = a->s[j], *x = a->x + (i * step * c + j) * p;
      for (int64_t q = 0; q < p; q += 4096) {
        const int64_t stop = q + 4096 < p ? q + 4096 : p;
        REAL u = 0, v = 0;
        if (a->dy) {
          const REAL *dy = a->dy + (i * c + j) * p;
#pragma omp simd reduction(+ : u, v)
          for (int64_t r = q; r < stop; r++) {
            u += dy[r];
            v += dy[r] * (x[r] - s);
          }
        } else {
#pragma omp simd reduction(+ : u, v)
          for (int64_t r = q; r < stop; r++) {
            const REAL d = x[r] - s;
            u += d;
            v += d * d;
          }
        }
        first[j] += u;
        second[j] += v;
      }
    }
  (void)thread;
}

static void add_rows(const REAL *restrict x, const REAL *restrict dy, const REAL *restrict s, REAL *restrict u, REAL *restrict v,
                     int64_t w, int64_t rows) {
  int64_t i = 0;
  for (; i + 4 <= rows; i += 4) { /* four rows at a time, so that the sums are loaded and stored once for four */
    const REAL *x0 = x + i * w, *x1 = x0 + w, *x2 = x1 + w, *x3 = x2 + w;
    if (dy) {
      const REAL *y0 = dy + i * w, *y1 = y0 + w, *y2 = y1 + w, *y3 = y2 + w;
#pragma omp simd
      for (int64_t j = 0; j < w; j++) {
        const REAL m = s[j];
        u[j] += (y0[j] + y1[j]) + (y2[j] + y3[j]);
        v[j] += (y0[j] * (x0[j] - m) + y1[j] * (x1[j] - m)) + (y2[j] * (x2[j] - m) + y3[j] * (x3[j] - m));
      }
    } else {
#pragma omp simd
      for (int64_t j = 0; j < w; j++) {
        const REAL m = s[j], a = x0[j] - m, b = x1[j] - m, c = x2[j] - m, d = x3[j] - m;
        u[j] += (a + b) + (c + d);
        v[j] += (a * a + b * b) + (c * c + d * d);
      }
    }
  }
  for (; i < rows; i++) {
    const REAL *x0 = x + i * w;
    if (dy) {
      const REAL *y0 = dy + i * w;
#pragma omp simd
      for (int64_t j = 0; j < w; j++) {
        u[j] += y0[j];
        v[j] += y0[j] * (x0[j] - s[j]);
      }
    } else {
#pragma omp simd
      for (int64_t j = 0; j < w; j++) {
        const REAL d = x0[j] - s[j];
        u[j] += d;
        v[j] += d * d;
      }
    }
  }
}

static void sum_columns(const void *arguments, int64_t begin, int64_t end, int thread) {
  const Sums *a = arguments;
  const Layout *l = a->l;
  const int64_t w = width(l);
  double *first = a->sums + 2 * w * thread, *second = first + w;
  REAL *u = malloc(2 * w * sizeof(REAL)), *v = u + w;
  for (int64_t j = 0; j < 2 * w; j++) first[j] = 0;
  /* if `every` is above 1, the samples read are not adjacent, and begin and end count only their rows */
  const int apart = !a->dy && l->every > 1;
  for (int64_t i = begin; i < end;) {
    int64_t stop = i + BLOCK < end ? i + BLOCK : end, row = i;
    if (apart) {
      const int64_t sample = i / l->per_sample, whole = (sample + 1) * l->per_sample;
      if (stop > whole) stop = whole;
      row = i + sample * (l->every - 1) * l->per_sample;
    }
    memset(u, 0, 2 * w * sizeof(REAL));
    add_rows(a->x + row * w, a->dy ? a->dy + row * w : NULL, a->s, u, v, w, stop - i);
    for (int64_t j = 0; j < w; j++) {
      first[j] += u[j];
      second[j] += v[j];
    }
    i = stop;
  }
  free(u);
}

/* Write the two sums of each channel to the first (2, channels) of `sums`. */
static void sum(const Layout *l, const REAL *x, const REAL *dy, const REAL *s, double *sums, int threads) {
  Sums a = {l, x, dy, s, sums};
  if (!l->columns) {
    in_parallel(sum_rows, &a, l->channels, threads < l->channels ? threads : (int)l->channels);
    return;
  }
  const int64_t w = width(l), rows = dy ? l->outer : l->k * l->per_sample;
  if (threads > rows) threads = (int)rows;
  in_parallel(sum_columns, &a, rows, threads);
  for (int64_t j = 0; j < 2 * w; j++)
    for (int t = 1; t < threads; t++) sums[j] += sums[2 * w * t + j];
  if (l->inner > 1)
    for (int64_t c = 0; c < 2 * l->channels; c++) {
      double total = 0;
      for (int64_t f = 0; f < l->inner; f++) total += sums[c * l->inner + f];
      sums[c] = total;
    }
}

/* Repeat each channel's value for all its columns; returns `values` itself if a channel is one column. */
static const REAL *spread(const Layout *l, const REAL *values, REAL *room) {
  if (!l->columns || l->inner == 1) return values;
  for (int64_t c = 0; c < l->channels; c++)
    for (int64_t f = 0; f < l->inner; f++) room[c * l->inner + f] = values[c];
  return room;
}

/* ---- maps: y = p·(x − mean) + r, or dx = p·dy + q·(x − mean) + r ---- */

typedef struct {
  const Layout *l;
  const REAL *x, *dy; /* dy is NULL for the first kind */
  REAL *out;
  const REAL *mean, *p, *q, *r; /* one value per channel (rows) or per column (columns) */
} Map;

/* Map n values of one channel. */
static void map_channel(int64_t n, const REAL *restrict x, const REAL *restrict dy, REAL *restrict out, REAL mean, REAL p,
                        REAL q, REAL r) {
  if (dy) {
#pragma omp simd
    for (int64_t j = 0; j < n; j++) out[j] = p * dy[j] + (q * (x[j] - mean) + r);
  } else {
#pragma omp simd
    for (int64_t j = 0; j < n; j++) out[j] = p * (x[j] - mean) + r;
  }
}

/* Map ROWS rows of w columns, loading each column's coefficients once for all rows. */
#define MAP_ROWS(ROWS)                                                                               \
  if (dy) {                                                                                          \
    _Pragma("omp simd") for (int64_t j = 0; j < w; j++) {                                            \
      const REAL mean = a->mean[j], p = a->p[j], q = a->q[j], r = a->r[j];                           \
      for (int i = 0; i < ROWS; i++) out[i * w + j] = p * dy[i * w + j] + (q * (x[i * w + j] - mean) + r); \
    }                                                                                                \
  } else {                                                                                           \
    _Pragma("omp simd") for (int64_t j = 0; j < w; j++) {                                            \
      const REAL mean = a->mean[j], p = a->p[j], r = a->r[j];                                        \
      for (int i = 0; i < ROWS; i++) out[i * w + j] = p * (x[i * w + j] - mean) + r;                 \
    }                                                                                                \
  }

static void map_part(const void *arguments, int64_t begin, int64_t end, int thread) {
  const Map *a = arguments;
  const int64_t w = a->l->columns ? width(a->l) : a->l->inner, c = a->l->channels;
  int64_t row = begin;
  if (!a->l->columns)
    for (; row < end; row++) {
      const int64_t j = row % c;
      map_channel(w, a->x + row * w, a->dy ? a->dy + row * w : NULL, a->out + row * w, a->mean[j], a->p[j],
                  a->dy ? a->q[j] : 0, a->r[j]);
    }
  for (; row + 4 <= end; row += 4) {
    const REAL *restrict x = a->x + row * w, *restrict dy = a->dy ? a->dy + row * w : NULL;
    REAL *restrict out = a->out + row * w;
    MAP_ROWS(4)
  }
  for (; row < end; row++) {
    const REAL *restrict x = a->x + row * w, *restrict dy = a->dy ? a->dy + row * w : NULL;
    REAL *restrict out = a->out + row * w;
    MAP_ROWS(1)
  }
  (void)thread;
}

static void map(const Map *a, int threads) {
  const Layout *l = a->l;
  const int64_t n = l->columns ? l->outer : l->outer * l->channels;
  const size_t bytes = (size_t)(l->outer * l->channels * l->inner) * sizeof(REAL);
  if (bytes >= 4 * HUGE_PAGE) large_pages(a->out, bytes);
  in_parallel(map_part, a, n, threads < n ? threads : (int)n);
}

/* ---- the step ---- */

typedef struct {
  Layout layout;
  int64_t bs, threads;
  double rate, start, eps; /* λ, and its value before the first sample */
  double clamp, young_until; /* floor of V while fewer than young_until samples were seen; 0 means never */
  const REAL *x;
  REAL *y;
  const REAL *weight, *bias; /* (channels) or NULL */
  REAL *mean, *var, *count;
  int64_t *samples, *batches;
  REAL *saved; /* for the backward pass: SAVED rows of (channels), then SHARE, OWN, MOVES, YOUNG */
} Forward;

typedef struct {
  Layout layout;
  int64_t threads;
  double rate;
  const REAL *dy, *x;
  REAL *dx; /* NULL if not wanted; the averages then stay as they are */
  const REAL *weight, *saved;
  REAL *d_weight, *d_bias, *running_grad, *running_grad_weight;
} Backward;

enum { INV, M, V, MEAN, VAR, SAVED };
enum { SHARE, OWN, MOVES, YOUNG };

/* Write m and v of the samples read to `saved`; return 0 if they are not finite. */
static int statistics(const Layout *l, const REAL *x, double *sums, REAL *near, REAL *room, REAL *saved, int threads) {
  const int64_t c = l->channels, w = width(l), first = l->columns ? (l->per_sample < 8 ? l->per_sample : 8) : 1;
  const int64_t n = elements_read(l);
  for (int64_t j = 0; j < c; j++) { /* guess of a channel's mean: over the first few positions of the first sample */
    double total = 0;
    const int64_t few = l->columns ? l->inner : l->inner < 16 ? l->inner : 16;
    for (int64_t i = 0; i < first; i++)
      for (int64_t f = 0; f < few; f++) total += x[l->columns ? i * w + j * l->inner + f : j * l->inner + f];
    near[j] = (REAL)(total / (first * few));
  }
  int finite = 1;
  for (int again = 0; again < 2; again++) {
    int far = 0;
    sum(l, x, NULL, spread(l, near, room), sums, threads);
    for (int64_t j = 0; j < c; j++) {
      const double d = sums[j] / n, v = sums[c + j] / n - d * d;
      saved[M * c + j] = (REAL)(near[j] + d);
      saved[V * c + j] = (REAL)(v > 0 ? v : v == v ? 0 : v);
      finite &= isfinite(saved[M * c + j]) && isfinite(saved[V * c + j]);
      far |= d * d > 16 * v;
    }
    if (!far || !finite) break;
    for (int64_t j = 0; j < c; j++) near[j] = saved[M * c + j];
  }
  return finite;
}

/* Whether no statistic overflows when it moves to the batch's m and v: the rule of reference.py. */
static int usable(const Forward *f, int64_t c) {
  for (int64_t j = 0; j < c; j++) {
    const double shift = (double)f->saved[M * c + j] - f->mean[j];
    if (!isfinite((REAL)(f->saved[V * c + j] + shift * shift))) return 0;
  }
  return 1;
}

/* Move the running statistics by the batch's m and v in `saved`; return the batch's share a. */
static double move(const Forward *f, int64_t c, double n) {
  const REAL *m = f->saved + M * c, *v = f->saved + V * c;
  const double old = *f->count, moved = old < 0 ? n : f->rate * n + (1 - f->rate) * old, a = f->rate * n / moved;
  for (int64_t j = 0; j < c; j++) {
    const double d = (double)m[j] - f->mean[j];
    f->mean[j] = (REAL)(f->mean[j] + a * d);
    f->var[j] = (REAL)((1 - a) * f->var[j] + a * v[j] + a * (1 - a) * d * d);
  }
  *f->count = (REAL)moved;
  return a;
}

/* Returns 0, or 1 if out of memory. */
int rbn_forward(const Forward *f) {
  const Layout *l = &f->layout;
  const int64_t c = l->channels, w = width(l), lanes = l->columns ? f->threads : 1;
  const int threads = (int)f->threads;
  double *sums = malloc((size_t)(2 * w * lanes) * sizeof(double) + (size_t)(3 * w + 2 * c) * sizeof(REAL));
  if (!sums) return 1;
  REAL *room = (REAL *)(sums + 2 * w * lanes), *scale = room + 3 * w, *shift = scale + c, *saved = f->saved;

  const double n = (double)elements_read(l);
  const int moves = statistics(l, f->x, sums, scale, room, saved, threads) && usable(f, c);
  const double share = moves ? move(f, c, n) : 0;
  if (moves) *f->samples += f->bs, ++*f->batches;

  const int young = *f->samples < f->young_until;
  const REAL *mean = f->mean, *var = f->var, floor = (REAL)f->clamp;
  for (int64_t j = 0; j < c; j++) {
    const REAL inv = (REAL)(1 / sqrt((double)(young && var[j] < floor ? floor : var[j]) + f->eps));
    saved[MEAN * c + j] = mean[j];
    saved[VAR * c + j] = var[j];
    saved[INV * c + j] = inv;
    scale[j] = f->weight ? inv * f->weight[j] : inv;
    shift[j] = f->bias ? f->bias[j] : 0;
  }
  REAL *numbers = saved + SAVED * c;
  numbers[SHARE] = (REAL)share, numbers[OWN] = (REAL)(!moves ? 0 : share > f->start ? share : f->start);
  numbers[MOVES] = (REAL)moves, numbers[YOUNG] = (REAL)young;
  const REAL *p = spread(l, scale, room), *r = spread(l, shift, room + w), *mid = spread(l, saved + MEAN * c, room + 2 * w);
  const Map a = {l, f->x, NULL, f->y, mid, p, NULL, r};
  map(&a, threads);
  free(sums);
  return 0;
}

/* Returns 0, or 1 if out of memory. */
int rbn_backward(const Backward *b) {
  const Layout *l = &b->layout;
  const int64_t c = l->channels, w = width(l), lanes = l->columns ? b->threads : 1;
  const int threads = (int)b->threads;
  double *sums = malloc((size_t)(2 * w * lanes) * sizeof(double) + (size_t)(4 * w + 3 * c) * sizeof(REAL));
  if (!sums) return 1;
  REAL *room = (REAL *)(sums + 2 * w * lanes), *p = room + 4 * w, *q = p + c, *r = q + c, *grad = b->running_grad;
  const REAL *inv = b->saved + INV * c, *m = b->saved + M * c, *v = b->saved + V * c;
  const REAL *mean = b->saved + MEAN * c, *numbers = b->saved + SAVED * c;

  sum(l, b->x, b->dy, spread(l, m, room), sums, threads);
  int finite = 1;
  for (int64_t j = 0; j < c; j++) {
    sums[c + j] *= inv[j]; /* Σdy·ĉ */
    b->d_bias[j] = (REAL)sums[j];
    b->d_weight[j] = (REAL)(sums[c + j] + ((double)m[j] - mean[j]) * inv[j] * sums[j]);
    finite &= isfinite(b->d_bias[j]) && isfinite(b->d_weight[j]);
  }
  if (!b->dx) {
    free(sums);
    return 0;
  }
  /* `projection` in reference.py */
  const double rate = b->rate, n = (double)elements(l), own = numbers[OWN];
  if (finite) {
    for (int64_t j = 0; j < c; j++) {
      grad[j] = (REAL)(grad[j] + rate * (b->d_bias[j] / n - grad[j]));
      grad[c + j] = (REAL)(grad[c + j] + rate * (b->d_weight[j] / n - grad[c + j]));
    }
    *b->running_grad_weight = (REAL)(*b->running_grad_weight + rate * (1 - *b->running_grad_weight));
  }
  const double past = (1 - own) / (*b->running_grad_weight > 1e-30 ? *b->running_grad_weight : 1e-30);
  for (int64_t j = 0; j < c; j++) {
    const double off = ((double)m[j] - mean[j]) * inv[j], u = sums[j] / n;
    const double z = sums[c + j] / n / fmax((double)v[j] * inv[j] * inv[j], 1);
    const double scale = b->weight ? (double)inv[j] * b->weight[j] : inv[j];
    p[j] = (REAL)scale;
    r[j] = (REAL)(-scale * (own * (u - off * z) + past * grad[j]));
    q[j] = (REAL)(-scale * inv[j] * (own * z + past * grad[c + j]));
  }
  const Map a = {l, b->x, b->dy, b->dx, spread(l, mean, room), spread(l, p, room + w), spread(l, q, room + 2 * w), spread(l, r, room + 3 * w)};
  map(&a, threads);
  free(sums);
  return 0;
}
