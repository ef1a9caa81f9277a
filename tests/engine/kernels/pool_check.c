/* Hammers the pool: `pool_check ROUNDS CHECK...`. Ends with 1 and a line where a check fails, and
 * by a signal where one hangs. test_pool.py compiles it with pool.c under sanitizers. */
#define _GNU_SOURCE

#include "pool.h"

#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#define REQUIRE(condition)                                                                         \
    do {                                                                                           \
        if (!(condition)) {                                                                        \
            fprintf(stderr, "line %d: not %s\n", __LINE__, #condition);                            \
            _exit(1);                                                                              \
        }                                                                                          \
    } while (0)

#define MOST_ITEMS 20000

struct counts {
    int done[MOST_ITEMS]; /* plain: the pool alone orders the threads */
};

static void count(void *context, int item)
{
    ((struct counts *)context)->done[item]++;
}

static void run_once_each(struct counts *counts, int items)
{
    memset(counts->done, 0, sizeof counts->done);
    moestro_pool_run(items, count, counts);
    for (int item = 0; item < MOST_ITEMS; item++)
        REQUIRE(counts->done[item] == (item < items ? 1 : 0));
}

static void rest_us(long us)
{
    struct timespec rest = {0, us * 1000};
    nanosleep(&rest, NULL);
}

/* Every number of items on every number of threads; workers that spin, and that sleep. */
static void check_once(int rounds)
{
    static const int threads[] = {1, 2, 5, 3, 16, 4, 1, 8}, items[] = {0, 1, 2, 3, 17, 999, 20000};
    static struct counts counts;
    for (int round = 0; round < rounds; round++) {
        int wanted = threads[round % 8];
        REQUIRE(moestro_pool_set_threads(wanted) == wanted && moestro_pool_threads() == wanted);
        for (int call = 0; call < 21; call++)
            run_once_each(&counts, items[call % 7]);
        rest_us(200);
        run_once_each(&counts, MOST_ITEMS);
    }
    REQUIRE(moestro_pool_set_threads(0) == 1 && moestro_pool_set_threads(-7) == 1);
    run_once_each(&counts, MOST_ITEMS);
    run_once_each(&counts, -1);
}

/* Many short calls one after the other: a worker may be one call late at any step. */
static void check_short(int rounds)
{
    static int sums[64];
    moestro_pool_set_threads(4);
    for (int call = 1; call <= rounds * 200; call++) {
        moestro_pool_run(2 + call % 5, count, sums);
        REQUIRE(sums[0] == call && sums[1] == call);
    }
}

struct meeting {
    atomic_int here;
    int wanted;
    pthread_t threads[16];
    sigset_t masks[16];
};

/* Ends only when all items run at the same time. */
static void meet(void *context, int item)
{
    struct meeting *meeting = context;
    meeting->threads[item] = pthread_self();
    pthread_sigmask(SIG_BLOCK, NULL, &meeting->masks[item]);
    atomic_fetch_add(&meeting->here, 1);
    while (atomic_load(&meeting->here) < meeting->wanted)
        sched_yield();
}

/* As many at once as there are threads, the caller among them; no signal reaches a worker. */
static void check_together(int rounds)
{
    for (int round = 0; round < rounds; round++) {
        struct meeting meeting = {.wanted = 2 + round % 7};
        int callers = 0, threads = round % 2 ? meeting.wanted : 8;
        moestro_pool_set_threads(threads);
        if (round % 3 == 0)
            rest_us(200);
        moestro_pool_run(meeting.wanted, meet, &meeting);
        for (int item = 0; item < meeting.wanted; item++) {
            int caller = pthread_equal(meeting.threads[item], pthread_self());
            callers += caller;
            REQUIRE(sigismember(&meeting.masks[item], SIGINT) == !caller);
            REQUIRE(sigismember(&meeting.masks[item], SIGTERM) == !caller);
        }
        REQUIRE(callers == 1 || (callers == 0 && threads > meeting.wanted));
    }
}

static void run_within(void *context, int item)
{
    int done[5] = {0}, before = moestro_pool_threads();
    moestro_pool_run(5, count, done);
    for (int inner = 0; inner < 5; inner++)
        REQUIRE(done[inner] == 1);
    REQUIRE(moestro_pool_set_threads(before + 1) == before);
    count(context, item);
}

static void check_nested(int rounds)
{
    for (int round = 0; round < rounds; round++) {
        int done[40] = {0};
        moestro_pool_set_threads(1 + round % 4);
        moestro_pool_run(40, run_within, done);
        for (int item = 0; item < 40; item++)
            REQUIRE(done[item] == 1);
    }
}

static atomic_int ended;

static void *call_until_ended(void *counts)
{
    while (!atomic_load(&ended))
        run_once_each(counts, 500);
    return NULL;
}

static void start_callers(pthread_t callers[2])
{
    static struct counts counts[2];
    atomic_store(&ended, 0);
    for (int caller = 0; caller < 2; caller++)
        REQUIRE(pthread_create(&callers[caller], NULL, call_until_ended, &counts[caller]) == 0);
}

static void end_callers(pthread_t callers[2])
{
    atomic_store(&ended, 1);
    for (int caller = 0; caller < 2; caller++)
        pthread_join(callers[caller], NULL);
}

/* Two threads call while a third calls, too, and changes the number of workers. */
static void check_callers(int rounds)
{
    static struct counts counts;
    pthread_t callers[2];
    start_callers(callers);
    for (int round = 0; round < rounds; round++) {
        int wanted = 1 + round % 5;
        REQUIRE(moestro_pool_set_threads(wanted) == wanted);
        run_once_each(&counts, 500);
    }
    end_callers(callers);
}

/* The child has no workers; it computes alone, however busy the pool was. */
static void check_fork(int rounds)
{
    static struct counts counts;
    pthread_t callers[2];
    moestro_pool_set_threads(4);
    start_callers(callers);
    for (int round = 0; round < rounds; round++) {
        run_once_each(&counts, 100);
        pid_t child = fork();
        REQUIRE(child >= 0);
        if (child == 0) {
            alarm(60);
            REQUIRE(moestro_pool_threads() == 1);
            run_once_each(&counts, MOST_ITEMS);
            REQUIRE(moestro_pool_set_threads(1) == 1);
            _exit(0);
        }
        int status;
        REQUIRE(waitpid(child, &status, 0) == child && status == 0);
        REQUIRE(moestro_pool_threads() == 4);
    }
    end_callers(callers);
}

/* Where a sanitizer owns the allocator, workers have started before a fork: a starting thread may
 * hold the allocator's lock, which gcc 12's sanitizer does not give back in the child (glibc does).
 */
static void before_fork(int threads)
{
#ifdef __SANITIZE_ADDRESS__
    struct meeting all = {.wanted = threads};
    moestro_pool_run(threads, meet, &all);
#else
    (void)threads;
#endif
}

/* A child may start workers of its own. (The thread sanitizer ends a program that does.) */
static void check_child(int rounds)
{
    for (int round = 0; round < rounds; round++) {
        struct meeting meeting = {.wanted = 4};
        moestro_pool_set_threads(1 + round % 4);
        before_fork(1 + round % 4);
        pid_t child = fork();
        REQUIRE(child >= 0);
        if (child == 0) {
            alarm(60);
            REQUIRE(moestro_pool_threads() == 1 && moestro_pool_set_threads(4) == 4);
            moestro_pool_run(4, meet, &meeting);
            _exit(0);
        }
        int status;
        REQUIRE(waitpid(child, &status, 0) == child && status == 0);
    }
}

struct forked {
    struct meeting meeting;
    pthread_t caller;
    pid_t child;
};

static void fork_within(void *context, int item)
{
    struct forked *forked = context;
    meet(&forked->meeting, item);
    if (pthread_equal(pthread_self(), forked->caller)) {
        forked->child = fork();
        REQUIRE(forked->child >= 0);
        if (forked->child == 0)
            alarm(60);
    }
}

/* The call that a child was forked from ends in both. */
static void check_fork_within(int rounds)
{
    moestro_pool_set_threads(3);
    for (int round = 0; round < rounds; round++) {
        struct forked forked = {.meeting.wanted = 3, .caller = pthread_self(), .child = -1};
        int done[9] = {0}, status;
        moestro_pool_run(3, fork_within, &forked);
        moestro_pool_run(9, count, done);
        for (int item = 0; item < 9; item++)
            REQUIRE(done[item] == 1);
        if (forked.child == 0)
            _exit(moestro_pool_threads() == 1 ? 0 : 1);
        REQUIRE(waitpid(forked.child, &status, 0) == forked.child && status == 0);
    }
}

static char state_of(pid_t thread)
{
    char path[64], line[256], state = '?';
    snprintf(path, sizeof path, "/proc/self/task/%d/stat", (int)thread);
    FILE *file = fopen(path, "r");
    if (file != NULL && fgets(line, sizeof line, file) != NULL)
        state = strrchr(line, ')')[2];
    if (file != NULL)
        fclose(file);
    return state;
}

struct sleepers {
    atomic_int here;
    pid_t caller, threads[2];
};

/* The worker goes on only when the caller sleeps. */
static void wait_for_sleep(void *context, int item)
{
    struct sleepers *both = context;
    both->threads[item] = gettid();
    atomic_fetch_add(&both->here, 1);
    while (atomic_load(&both->here) < 2)
        sched_yield();
    while (gettid() != both->caller && state_of(both->caller) != 'S')
        sched_yield();
}

/* Who has long nothing to do sleeps: a caller for its last worker, and a worker without a job. */
static void check_sleep(int rounds)
{
    moestro_pool_set_threads(2);
    for (int round = 0; round < rounds; round++) {
        struct sleepers both = {.caller = gettid()};
        moestro_pool_run(2, wait_for_sleep, &both);
        for (int item = 0; item < 2; item++)
            while (both.threads[item] != both.caller && state_of(both.threads[item]) != 'S')
                sched_yield();
    }
}

/* Where there is no memory for another stack. */
static void check_refused(int rounds)
{
    static struct counts counts;
    struct rlimit before, tight;
    REQUIRE(getrlimit(RLIMIT_AS, &before) == 0);
    tight = before;
    tight.rlim_cur = 40 << 20;
    for (int round = 0; round < rounds; round++) {
        REQUIRE(setrlimit(RLIMIT_AS, &tight) == 0);
        int threads = moestro_pool_set_threads(500);
        REQUIRE(threads >= 1 && threads < 500 && threads == moestro_pool_threads());
        run_once_each(&counts, MOST_ITEMS);
        REQUIRE(setrlimit(RLIMIT_AS, &before) == 0);
        REQUIRE(moestro_pool_set_threads(6) == 6);
        run_once_each(&counts, MOST_ITEMS);
    }
}

static const struct {
    const char *name;
    void (*check)(int rounds);
} CHECKS[] = {
    {"once", check_once},       {"short", check_short},     {"together", check_together},
    {"nested", check_nested},   {"callers", check_callers}, {"fork", check_fork},
    {"child", check_child},     {"fork-within", check_fork_within},
    {"sleep", check_sleep},     {"refused", check_refused},
};

int main(int count, char **words)
{
    alarm(240);
    for (int word = 2; word < count; word++) {
        int found = 0;
        for (size_t number = 0; number < sizeof CHECKS / sizeof CHECKS[0]; number++) {
            if (strcmp(CHECKS[number].name, words[word]) == 0) {
                CHECKS[number].check(atoi(words[1]));
                found = 1;
            }
        }
        REQUIRE(found);
    }
    moestro_pool_set_threads(1);
    return 0;
}
