#ifndef MOESTRO_POOL_H
#define MOESTRO_POOL_H
typedef void (*moestro_work)(void *context, int item);
void moestro_pool_run(int items, moestro_work work, void *context);
int moestro_pool_set_threads(int threads);
int moestro_pool_threads(void);
#endif
