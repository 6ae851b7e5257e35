// The interface of the WKV-4 kernels for CPUs. ops/reference.py has the mathematics.
#pragma once

#include <cstdint>

#include "element.h"

namespace receptance {

// The forward pass keeps the state before every kChunk tokens for the backward pass.
constexpr int64_t kChunk = 32;

// All pointers are to contiguous memory. Those marked "wide" point to float, or to double where the
// elements are float64; the others point to elements.
struct Forward {
    int64_t batch, time, width;
    const void *log_decay, *bonus;                      // [C] wide
    const void *key, *value;                            // [B,T,C]
    const void *numerator, *denominator, *exponent;     // [B,C] wide
    const bool* resets;                                 // [B,T] or null
    const int64_t* lengths;                             // [B] or null
    void* out;                                          // [B,T,C]
    void *numerator_out, *denominator_out, *exponent_out;  // [B,C] wide
    void* starts;                                       // [B,N,3,C] wide, for N chunks
};

struct Backward {
    int64_t batch, time, width;
    const void* grad_out;                               // [B,T,C]
    const void *grad_numerator, *grad_denominator;      // [B,C] wide
    const void *log_decay, *bonus;                      // [C] wide
    const void *key, *value;                            // [B,T,C]
    const void* starts;                                 // [B,N,3,C] wide
    const bool* resets;                                 // [B,T] or null
    const int64_t* lengths;                             // [B] or null
    double *grad_log_decay, *grad_bonus;                // [B,C]; the caller sums them over B
    void *grad_key, *grad_value;                        // [B,T,C]
    void *grad_numerator_in, *grad_denominator_in;      // [B,C] wide
};

struct Wkv4Kernels {
    void (*forward)(const Forward&, Element, int threads);
    void (*backward)(const Backward&, Element, int threads);
};

// There is one table per instruction set: the same source compiled with other flags.
extern const Wkv4Kernels wkv4_portable;
#if defined(RECEPTANCE_X86)
extern const Wkv4Kernels wkv4_avx2;
extern const Wkv4Kernels wkv4_avx512;
#endif

}  // namespace receptance
