#if defined(__x86_64__)
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx2,fma,f16c")
#endif
#include <math.h>
#include "moestro.h"
#include "simd_avx512.h"
#include "products.h"
#include "stripes.h"
#include "rowwise.h"
#include "step.h"
#define STEP_ISA step_avx512
#include "attention.h"
#include "prompt_attention.h"

const isa ISA = {ISA_NAME, PANEL, few, multiply, panel_bytes, pack, multiply_panels, finish_row, quantize,
                 activate, combine};

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("amx-tile,amx-int8"))), apply_to = function)
#else
#pragma GCC target("amx-tile,amx-int8")
#endif
#include "amx.h"

const isa isa_amx = {"amx-int8", PANEL, few, multiply, panel_bytes, pack, amx_multiply_panels,
                     finish_row, quantize, activate, combine};
#if defined(__clang__)
#pragma clang attribute pop
#pragma clang attribute pop
#endif
#else
typedef int nothing_here;
#endif
