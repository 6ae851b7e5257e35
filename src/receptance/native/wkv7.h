// The interface of the WKV-7 kernels for CPUs. ops/wkv7_reference.py has the mathematics.
#pragma once

#include <cstdint>

#include "element.h"

namespace receptance {

// The forward pass keeps the state before every kWkv7Chunk tokens for the backward pass.
constexpr int64_t kWkv7Chunk = 32;

// All pointers are to contiguous memory. Those marked "wide" point to float, or to double where the
// elements are float64; the others point to elements. There are H heads of N channels. The rows of
// a state belong to values and its columns to keys.
struct Wkv7Forward {
    int64_t batch, time, heads, size;
    const void* receptance;                                // [B,T,H,N]
    const void* log_decay;                                 // [B,T,H,N] wide
    const void *key, *value, *removal, *replacement;       // [B,T,H,N]
    const void* state;                                     // [B,H,N,N] wide
    const bool* resets;                                    // [B,T] or null
    const int64_t* lengths;                                // [B] or null
    void* out;                                             // [B,T,H,N]
    void* state_out;                                       // [B,H,N,N] wide
    void* starts;                                          // [K,B,H,N,N] wide, for K chunks
};

struct Wkv7Backward {
    int64_t batch, time, heads, size;
    const void* grad_out;                                  // [B,T,H,N]
    const void* grad_state;                                // [B,H,N,N] wide
    const void* receptance;                                // [B,T,H,N]
    const void* log_decay;                                 // [B,T,H,N] wide
    const void *key, *value, *removal, *replacement;       // [B,T,H,N]
    const void* starts;                                    // [K,B,H,N,N] wide
    const bool* resets;                                    // [B,T] or null
    const int64_t* lengths;                                // [B] or null
    void* grad_receptance;                                 // [B,T,H,N]
    void* grad_log_decay;                                  // [B,T,H,N] wide
    void *grad_key, *grad_value, *grad_removal, *grad_replacement;  // [B,T,H,N]
    void* grad_state_in;                                   // [B,H,N,N] wide
};

struct Wkv7Kernels {
    void (*forward)(const Wkv7Forward&, Element, int threads);
    void (*backward)(const Wkv7Backward&, Element, int threads);
};

// There is one table per instruction set: the same source compiled with other flags.
extern const Wkv7Kernels wkv7_portable;
#if defined(RECEPTANCE_X86)
extern const Wkv7Kernels wkv7_avx2;
extern const Wkv7Kernels wkv7_avx512;
#endif

}  // namespace receptance
