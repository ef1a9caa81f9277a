/* The pool: see pool.h. Linux, macOS and the like; C11 atomics.
 *
 * A call is a job. Nobody waits for a worker that has not come: a worker *enters* the open job,
 * takes items until there are none and *leaves*; the caller does the same, closes the job, and
 * waits only for those inside. So a worker that sleeps, or that the system has put aside, costs
 * nothing unless it holds items, and these are few (see `take`).
 *
 *      state   | job number, 32 bits | open, 1 bit | workers inside, 31 bits |
 *
 *      open, n --enter--> open, n+1      closed, n --leave--> closed, n-1
 *      open, n --leave--> open, n-1      closed, 0 --run----> next job, open, 0
 *      open, n --close--> closed, n
 *
 * The fields of a job are written while it is closed and nobody is inside, and read by those
 * inside.
 */
#define _POSIX_C_SOURCE 200809L

#include "pool.h"

#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdint.h>
#include <time.h>

#define MOST_WORKERS 1023
#define PIECES 2             /* of what is left, per thread */
#define SPIN_NS 250000       /* through what one thread does between two calls */
#define PAUSES_PER_LOOK 64   /* between two looks at the clock */
#define CACHE_LINE 64

#define OPEN ((uint64_t)1 << 31)
#define INSIDE (OPEN - 1)

static struct {
    _Alignas(CACHE_LINE) atomic_uint_fast64_t state;
    _Alignas(CACHE_LINE) atomic_int next; /* the first item that nobody has taken */

    /* The job. */
    _Alignas(CACHE_LINE) moestro_work work;
    void *context;
    int items;

    atomic_int busy;     /* somebody runs a job or changes the number of workers */
    atomic_int workers;  /* started and not ended; those from here on shall end */
    atomic_int sleeping; /* workers on `wake` */
    atomic_int waiting;  /* the caller is on `done` */
    int knows_forks;
    pthread_t threads[MOST_WORKERS];
    pthread_mutex_t mutex;
    pthread_cond_t wake, done;
} pool = {
    .mutex = PTHREAD_MUTEX_INITIALIZER,
    .wake = PTHREAD_COND_INITIALIZER,
    .done = PTHREAD_COND_INITIALIZER,
};

static _Thread_local int inside; /* this thread computes items, or is a worker */

/* Waiting without sleeping, for a bounded time. Starts as zero. */
struct patience {
    int pauses;
    int64_t end_ns;
};

static void pause_briefly(void)
{
#if defined(__x86_64__) || defined(__i386__)
    __builtin_ia32_pause();
#elif defined(__aarch64__) || defined(__arm__)
    __asm__ __volatile__("yield");
#endif
}

static int64_t now_ns(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (int64_t)now.tv_sec * 1000000000 + now.tv_nsec;
}

/* False when it is time to sleep. */
static int spin(struct patience *patience)
{
    pause_briefly();
    if (++patience->pauses < PAUSES_PER_LOOK)
        return 1;
    patience->pauses = 0;
    int64_t now = now_ns();
    if (patience->end_ns == 0)
        patience->end_ns = now + SPIN_NS;
    return now < patience->end_ns;
}

/* The next items for this thread, [*first, *end): a small part of what is left, in the end one by
 * one, since cores differ in speed and some are put aside. False when all are taken. */
static int take(int *first, int *end)
{
    int shares = PIECES * (atomic_load_explicit(&pool.workers, memory_order_relaxed) + 1);
    int start = atomic_load_explicit(&pool.next, memory_order_relaxed), piece;
    do {
        if (start >= pool.items)
            return 0;
        piece = (pool.items - start) / shares;
        piece = piece < 1 ? 1 : piece;
    } while (!atomic_compare_exchange_weak(&pool.next, &start, start + piece));
    *first = start;
    *end = start + piece;
    return 1;
}

static void compute(void)
{
    int first, end;
    while (take(&first, &end))
        for (int item = first; item < end; item++)
            pool.work(pool.context, item);
}

static int is_new(uint64_t state, uint32_t seen)
{
    return (state & OPEN) != 0 && (uint32_t)(state >> 32) != seen;
}

/* True for a job that this worker has not seen, false when the worker shall end. */
static int await_job(int number, uint32_t seen)
{
    struct patience patience = {0};
    do {
        if (number >= atomic_load(&pool.workers))
            return 0;
        if (is_new(atomic_load(&pool.state), seen))
            return 1;
    } while (spin(&patience));
    pthread_mutex_lock(&pool.mutex);
    atomic_fetch_add(&pool.sleeping, 1);
    while (number < atomic_load(&pool.workers) && !is_new(atomic_load(&pool.state), seen))
        pthread_cond_wait(&pool.wake, &pool.mutex);
    atomic_fetch_sub(&pool.sleeping, 1);
    pthread_mutex_unlock(&pool.mutex);
    return number < atomic_load(&pool.workers);
}

/* False where the job was closed first. */
static int enter(uint32_t *seen)
{
    uint_fast64_t state = atomic_load(&pool.state);
    do {
        if (!is_new(state, *seen))
            return 0;
    } while (!atomic_compare_exchange_weak(&pool.state, &state, state + 1));
    *seen = (uint32_t)(state >> 32);
    return 1;
}

static void leave(void)
{
    uint64_t state = atomic_fetch_sub(&pool.state, 1) - 1;
    if ((state & (OPEN | INSIDE)) != 0 || !atomic_load(&pool.waiting))
        return;
    pthread_mutex_lock(&pool.mutex);
    pthread_cond_signal(&pool.done);
    pthread_mutex_unlock(&pool.mutex);
}

static void *serve(void *number)
{
    uint32_t seen = 0;
    inside = 1;
    while (await_job((int)(intptr_t)number, seen)) {
        if (enter(&seen)) {
            compute();
            leave();
        }
    }
    return NULL;
}

/* `sleeping` is read after `state` was written, and a worker counts itself before it reads `state`
 * for the last time: one of the two sees the other. Passing through the mutex waits for a worker
 * that has read it and is not on `wake` yet. */
static void wake_workers(int wanted)
{
    int sleeping = atomic_load(&pool.sleeping);
    wanted -= atomic_load(&pool.workers) - sleeping; /* the others look by themselves */
    if (sleeping == 0 || wanted <= 0)
        return;
    pthread_mutex_lock(&pool.mutex);
    pthread_mutex_unlock(&pool.mutex);
    if (wanted >= sleeping) {
        pthread_cond_broadcast(&pool.wake);
        return;
    }
    while (wanted-- > 0)
        pthread_cond_signal(&pool.wake);
}

static void open_job(int items, moestro_work work, void *context)
{
    pool.work = work;
    pool.context = context;
    pool.items = items;
    atomic_store(&pool.next, 0);
    uint32_t number = (uint32_t)(atomic_load(&pool.state) >> 32) + 1;
    atomic_store(&pool.state, (uint64_t)number << 32 | OPEN);
    wake_workers(items - 1);
}

static void close_job(void)
{
    struct patience patience = {0};
    atomic_fetch_and(&pool.state, ~OPEN);
    while ((atomic_load(&pool.state) & INSIDE) != 0) {
        if (spin(&patience))
            continue;
        pthread_mutex_lock(&pool.mutex);
        atomic_store(&pool.waiting, 1);
        while ((atomic_load(&pool.state) & INSIDE) != 0)
            pthread_cond_wait(&pool.done, &pool.mutex);
        atomic_store(&pool.waiting, 0);
        pthread_mutex_unlock(&pool.mutex);
    }
}

void moestro_pool_run(int items, moestro_work work, void *context)
{
    int outer = inside, alone = items <= 1 || inside || moestro_pool_threads() == 1;
    inside = 1;
    if (alone || atomic_exchange(&pool.busy, 1)) {
        for (int item = 0; item < items; item++)
            work(context, item);
    } else {
        open_job(items, work, context);
        compute();
        close_job();
        atomic_store(&pool.busy, 0);
    }
    inside = outer;
}

/* In the child only the thread that forked is there. If it did so within a work, the items of the
 * others are not done. */
static void forget_workers(void)
{
    pthread_mutex_init(&pool.mutex, NULL);
    pthread_cond_init(&pool.wake, NULL);
    pthread_cond_init(&pool.done, NULL);
    atomic_store(&pool.state, 0);
    atomic_store(&pool.workers, 0);
    atomic_store(&pool.sleeping, 0);
    atomic_store(&pool.waiting, 0);
    atomic_store(&pool.busy, 0);
}

/* Signals stay with the threads that were there before. */
static void start_workers(int wanted)
{
    sigset_t all, before;
    if (!pool.knows_forks && pthread_atfork(NULL, NULL, forget_workers) != 0)
        return;
    pool.knows_forks = 1;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    for (int number = atomic_load(&pool.workers); number < wanted; number++) {
        atomic_store(&pool.workers, number + 1);
        if (pthread_create(&pool.threads[number], NULL, serve, (void *)(intptr_t)number) != 0) {
            atomic_store(&pool.workers, number);
            break;
        }
    }
    pthread_sigmask(SIG_SETMASK, &before, NULL);
}

static void stop_workers(int wanted)
{
    int workers = atomic_exchange(&pool.workers, wanted);
    pthread_mutex_lock(&pool.mutex);
    pthread_mutex_unlock(&pool.mutex);
    pthread_cond_broadcast(&pool.wake);
    for (int number = wanted; number < workers; number++)
        pthread_join(pool.threads[number], NULL);
}

int moestro_pool_set_threads(int threads)
{
    if (inside)
        return moestro_pool_threads();
    int wanted = threads < 1 ? 0 : threads > MOST_WORKERS ? MOST_WORKERS : threads - 1;
    while (atomic_exchange(&pool.busy, 1))
        sched_yield();
    if (wanted > atomic_load(&pool.workers))
        start_workers(wanted);
    else
        stop_workers(wanted);
    atomic_store(&pool.busy, 0);
    return moestro_pool_threads();
}

int moestro_pool_threads(void)
{
    return atomic_load_explicit(&pool.workers, memory_order_relaxed) + 1;
}
