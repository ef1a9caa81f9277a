#include "moestro.h"
#include "simd_plain.h"
#include "products.h"
#include "rowwise.h"

const isa isa_plain = {
    .name = "plain",
    .multiply = multiply,
    .quantize = quantize,
    .activate = activate,
    .combine = combine,
};
