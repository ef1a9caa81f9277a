#include "moestro.h"
#include "simd_plain.h"
#include "products.h"
