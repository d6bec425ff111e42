/* Run a loop on several threads; shared by the C kernels of this package. */

#include <pthread.h>
#include <stddef.h>
#include <stdint.h>

#define MOST_THREADS 64

typedef struct {
  const void *function_arguments;
  void (*function)(const void *, int64_t, int64_t, int);
  int64_t begin, end;
  int thread;
} Task;

static void *run_task(void *t) {
  Task *task = t;
  task->function(task->function_arguments, task->begin, task->end, task->thread);
  return NULL;
}

/* Call function(arguments, begin, end, thread) for parts of 0..n, one per thread. Threads end with the call, so a forked
   process never misses any. */
static void in_parallel(void (*function)(const void *, int64_t, int64_t, int), const void *arguments, int64_t n,
                        int threads) {
  Task tasks[MOST_THREADS];
  pthread_t started[MOST_THREADS];
  int running[MOST_THREADS];
  for (int t = 0; t < threads; t++) {
    tasks[t] = (Task){arguments, function, n * t / threads, n * (t + 1) / threads, t};
    running[t] = t > 0 && pthread_create(&started[t], NULL, run_task, &tasks[t]) == 0;
  }
  for (int t = 0; t < threads; t++)
    if (!running[t]) run_task(&tasks[t]);
  for (int t = 1; t < threads; t++)
    if (running[t]) pthread_join(started[t], NULL);
}
