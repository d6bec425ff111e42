/* Mean, deviation, shares near zero and histogram of a tensor, each value read from memory once.

   Compiled by fastrbn/native_build.py when it is first needed, with -DREAL=float or -DREAL=double. A block of values stays in
   the nearest cache for all that is asked of it. Sums run in REAL over a block, then in double. */

#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "native_threads.h"

#define BLOCK 2048
#define LANES 4 /* histograms side by side: equal values one after the other do not wait for each other */

typedef struct { /* as _ARGUMENTS of _activations.py */
  int64_t outer, channels, inner; /* value (n, c, p) is at (n·channels + c)·inner + p */
  int64_t bins;                   /* 0: no histogram */
  int64_t threads;
  double low, high, near;
  const REAL *x;
  float *out; /* mean, deviation, share near zero, share of channels that are near zero throughout, bins */
} Arguments;

typedef struct {
  double n, sum, mean, squares; /* squares of what lies between values and mean */
  int64_t near;
  char apart[24]; /* threads write to lines of their own */
} Sums;

typedef struct {
  const Arguments *a;
  Sums *sums;
  uint32_t *counts; /* (threads, LANES, bins + 1): the last is what lies beyond */
} Work;

/* Chan's rule: the mean and squares of two parts together. */
static void join(Sums *s, double n, double sum, double mean, double squares) {
  const double total = s->n + n, apart = mean - s->mean;
  s->sum += sum; /* beside the mean, which Inf makes NaN */
  if (s->n == 0) {
    s->mean = mean, s->squares = squares;
  } else {
    s->mean += apart * (n / total);
    s->squares += squares + apart * apart * (s->n * (n / total));
  }
  s->n = total;
}

static void moments(Sums *s, const REAL *x, int n, REAL near) {
  REAL sum = 0, squares = 0;
  int small = 0;
#pragma omp simd reduction(+ : sum, small)
  for (int i = 0; i < n; i++) {
    sum += x[i];
    small += (x[i] < 0 ? -x[i] : x[i]) < near;
  }
  const REAL mean = sum / n;
#pragma omp simd reduction(+ : squares)
  for (int i = 0; i < n; i++) squares += (x[i] - mean) * (x[i] - mean);
  join(s, n, sum, mean, squares);
  s->near += small;
}

/* As torch.histc, operation by operation: where values at the edges go depends on the rounding. */
static void count(uint32_t *counts, const REAL *x, int n, const Arguments *a) {
  const REAL low = a->low, high = a->high, bins = a->bins, width = high - low;
  const int32_t last = a->bins - 1;
  int32_t place[BLOCK];
#pragma omp simd
  for (int i = 0; i < n; i++) {
    const int inside = x[i] >= low && x[i] <= high; /* NaN is not */
    const int32_t at = (int32_t)(((inside ? x[i] : low) - low) * bins / width);
    place[i] = inside ? (at < last ? at : last) : last + 1;
  }
  uint32_t *lane[LANES];
  for (int j = 0; j < LANES; j++) lane[j] = counts + j * (a->bins + 1);
  int i = 0;
  for (; i + LANES <= n; i += LANES)
    for (int j = 0; j < LANES; j++) lane[j][place[i + j]]++;
  for (; i < n; i++) lane[0][place[i]]++;
}

static void look(const void *arguments, int64_t begin, int64_t end, int thread) {
  const Work *t = arguments;
  const Arguments *a = t->a;
  Sums sums = {0};
  uint32_t *counts = t->counts + thread * LANES * (a->bins + 1);
  for (int64_t i = begin; i < end; i += BLOCK) {
    const int n = end - i < BLOCK ? end - i : BLOCK;
    moments(&sums, a->x + i, n, a->near);
    if (a->bins) count(counts, a->x + i, n, a);
  }
  t->sums[thread] = sums;
}

/* Whether some of the values are not near zero. */
static int alive(const REAL *x, int64_t n, REAL near) {
  for (int64_t begin = 0; begin < n; begin += 16) {
    const int64_t end = begin + 16 < n ? begin + 16 : n;
    int far = 0;
    for (int64_t i = begin; i < end; i++) far |= !((x[i] < 0 ? -x[i] : x[i]) < near);
    if (far) return 1;
  }
  return 0;
}

/* Most channels show in their first values that they are not dead. */
static float dead_share(const Arguments *a) {
  int64_t dead = 0;
  for (int64_t c = 0; c < a->channels; c++) {
    int far = 0;
    for (int64_t n = 0; n < a->outer && !far; n++) far = alive(a->x + (n * a->channels + c) * a->inner, a->inner, a->near);
    dead += !far;
  }
  return (float)dead / a->channels;
}

/* 0, or -1 when there is no memory left. */
int activations(const void *arguments) {
  const Arguments *a = arguments;
  const int64_t n = a->outer * (a->channels ? a->channels : 1) * a->inner;
  Sums sums[MOST_THREADS], all = {0};
  uint32_t few[LANES * 65], *counts = few;
  const size_t size = a->bins ? a->threads * LANES * (a->bins + 1) * sizeof *counts : 0;
  if (size > sizeof few && !(counts = malloc(size))) return -1;
  memset(counts, 0, size);
  const Work task = {a, sums, counts};
  in_parallel(look, &task, n, a->threads);
  for (int t = 0; t < a->threads; t++)
    if (sums[t].n) join(&all, sums[t].n, sums[t].sum, sums[t].mean, sums[t].squares), all.near += sums[t].near;
  a->out[0] = all.sum / n;
  a->out[1] = sqrt(all.squares / n);
  a->out[2] = (float)((double)all.near / n);
  a->out[3] = a->channels ? dead_share(a) : NAN;
  for (int64_t b = 0; b < a->bins; b++) {
    uint64_t found = 0;
    for (int64_t l = 0; l < a->threads * LANES; l++) found += counts[l * (a->bins + 1) + b];
    a->out[4 + b] = found;
  }
  if (counts != few) free(counts);
  return 0;
}
