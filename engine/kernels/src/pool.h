/* Threads that compute one call's items together. Knows no weights and no products. */
#ifndef MOESTRO_POOL_H
#define MOESTRO_POOL_H

#pragma GCC visibility push(default)

/* One item of a call. It may run on any thread, and must neither throw nor jump out. */
typedef void (*moestro_work)(void *context, int item);

/* Runs work(context, item) once for every item in [0, items), on the calling thread and up to
 * threads-1 workers; returns when all are done. What the workers wrote is then visible to the
 * caller. Which thread has which item differs from call to call: results must not depend on it.
 *
 * One caller at a time has the workers. A second one, and a work that calls this, run their items
 * themselves. */
void moestro_pool_run(int items, moestro_work work, void *context);

/* How many compute, the caller included: at first, and after a fork in the child, 1. Starts and
 * stops workers until there are so many, waiting for a call that runs meanwhile. Returns the number
 * in force: fewer where the system refuses a thread, and the old one from inside a work. */
int moestro_pool_set_threads(int threads);

int moestro_pool_threads(void);

#pragma GCC visibility pop

#endif
