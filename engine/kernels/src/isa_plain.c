#include "moestro.h"
#include "simd_plain.h"
#include "products.h"
#include "rowwise.h"
#include "step.h"
#define STEP_ISA step_plain
#include "attention.h"
#include "prompt_attention.h"

const isa isa_plain = {
    .name = "plain",
    .multiply = multiply,
    .finish = finish_row,
    .quantize = quantize,
    .activate = activate,
    .combine = combine,
};
