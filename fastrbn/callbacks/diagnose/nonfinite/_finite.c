/* Whether tensors are finite, and copies of them: what HaltOnNaN does after every step on a CPU, a call each.

   Compiled by fastrbn/native_build.py when it is first needed. */

#include <math.h>
#include <stdint.h>
#include <string.h>

#include "native_threads.h"

enum { OPAQUE, FLOAT, DOUBLE, HALF, BFLOAT, KINDS = 7, PARAMETER = 8 }; /* as _KINDS and _PARAMETER of _nonfinite_native.py */

typedef struct {
  const void *from;
  void *to;
  int64_t bytes, kind; /* what is opaque is copied only */
} Part;

typedef struct {
  double params, others; /* sums of squares: not finite as soon as one element is not */
  char apart[48];        /* threads write to lines of their own */
} Sums;

typedef struct {
  const Part *parts;
  Sums *sums;
} Look;

/* The sum of squares; LANES sums, or each addition would wait for the last. */
#define LANES 64
#define SQUARES(name, type, wide)                                 \
  static double name(const type *x, int64_t n) {                  \
    wide sums[LANES] = {0};                                       \
    double total = 0;                                             \
    int64_t i = 0;                                                \
    for (; i + LANES <= n; i += LANES) {                          \
      _Pragma("omp simd") for (int j = 0; j < LANES; j++) {       \
        sums[j] += (wide)x[i + j] * x[i + j];                     \
      }                                                           \
    }                                                             \
    for (; i < n; i++) total += (double)x[i] * x[i];              \
    for (int j = 0; j < LANES; j++) total += sums[j];             \
    return total;                                                 \
  }
SQUARES(block_squares, float, float)
SQUARES(wide_squares, float, double)
SQUARES(double_squares, double, double)

#define BLOCK 8192 /* numbers that are summed in float */
static double float_squares(const float *x, int64_t n) {
  double total = 0;
  for (int64_t i = 0; i < n; i += BLOCK) {
    const int64_t size = n - i < BLOCK ? n - i : BLOCK;
    const double squares = block_squares(x + i, size);
    total += isfinite(squares) ? squares : wide_squares(x + i, size); /* in double no finite float overflows */
  }
  return total;
}

/* 0, or NaN when one of these 16 bit numbers has all bits of the exponent set */
static double narrow(const uint16_t *x, int64_t n, uint16_t exponent) {
  int bad = 0;
#pragma omp simd reduction(| : bad)
  for (int64_t i = 0; i < n; i++) bad |= (x[i] & exponent) == exponent;
  return bad ? NAN : 0;
}

static void look(const void *arguments, int64_t begin, int64_t end, int thread) {
  const Look *a = arguments;
  double params = 0, others = 0;
  for (const Part *p = a->parts + begin; p < a->parts + end; p++) {
    double squares = 0;
    switch (p->kind & KINDS) {
      case FLOAT: squares = float_squares(p->from, p->bytes / 4); break;
      case DOUBLE: squares = double_squares(p->from, p->bytes / 8); break;
      case HALF: squares = narrow(p->from, p->bytes / 2, 0x7c00); break;
      case BFLOAT: squares = narrow(p->from, p->bytes / 2, 0x7f80); break;
    }
    *(p->kind & PARAMETER ? &params : &others) += squares;
  }
  a->sums[thread].params = params;
  a->sums[thread].others = others;
}

static void copy(const void *arguments, int64_t begin, int64_t end, int thread) {
  for (const Part *p = (const Part *)arguments + begin; p < (const Part *)arguments + end; p++)
    memcpy(p->to, p->from, p->bytes);
  (void)thread;
}

/* The sum of squares of the parts that are parameters; Inf or NaN when that of all is not finite. When it is, and `keep`,
   all parts are copied. */
double finite_squares(const void *parts, int64_t n, int64_t threads, int64_t keep) {
  Sums sums[MOST_THREADS];
  const Look arguments = {parts, sums};
  in_parallel(look, &arguments, n, threads);
  double params = 0, others = 0;
  for (int t = 0; t < threads; t++) params += sums[t].params, others += sums[t].others;
  if (!isfinite(others)) params = INFINITY;
  if (keep && isfinite(params)) in_parallel(copy, parts, n, threads);
  return params;
}

void finite_copy(const void *parts, int64_t n, int64_t threads) { in_parallel(copy, parts, n, threads); }
