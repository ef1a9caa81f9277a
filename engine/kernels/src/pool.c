#include "pool.h"
void moestro_pool_run(int items, moestro_work work, void *context)
{
    for (int item = 0; item < items; item++)
        work(context, item);
}
__attribute__((visibility("default"))) int moestro_pool_set_threads(int threads) { (void)threads; return 1; }
__attribute__((visibility("default"))) int moestro_pool_threads(void) { return 1; }
