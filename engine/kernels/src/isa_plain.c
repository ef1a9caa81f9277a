#include "moestro.h"
#include "simd_plain.h"
#include "products.h"
#include "step.h"
#define STEP_ISA step_plain
#include "attention.h"
