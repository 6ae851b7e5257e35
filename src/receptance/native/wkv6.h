// The interface of the WKV-6 kernels for CPUs. ops/wkv6_reference.py has the mathematics.
#pragma once

#include <cstdint>

#include "element.h"

namespace receptance {

// The forward pass keeps the state before every kWkv6Chunk tokens for the backward pass.
constexpr int64_t kWkv6Chunk = 32;

// All pointers are to contiguous memory. Those marked "wide" point to float, or to double where the
// elements are float64; the others point to elements. There are H heads of N channels. The rows of
// a state belong to keys and its columns to values.
struct Wkv6Forward {
    int64_t batch, time, heads, size;
    const void* receptance;        // [B,T,H,N]
    const void* log_decay;         // [B,T,H,N] wide
    const void *key, *value;       // [B,T,H,N]
    const void* bonus;             // [H,N] wide
    const void* state;             // [B,H,N,N] wide
    const bool* resets;            // [B,T] or null
    const int64_t* lengths;        // [B] or null
    void* out;                     // [B,T,H,N]
    void* state_out;               // [B,H,N,N] wide
    void* starts;                  // [K,B,H,N,N] wide, for K chunks
};

struct Wkv6Backward {
    int64_t batch, time, heads, size;
    const void* grad_out;          // [B,T,H,N]
    const void* grad_state;        // [B,H,N,N] wide
    const void* receptance;        // [B,T,H,N]
    const void* log_decay;         // [B,T,H,N] wide
    const void *key, *value;       // [B,T,H,N]
    const void* bonus;             // [H,N] wide
    const void* starts;            // [K,B,H,N,N] wide
    const bool* resets;            // [B,T] or null
    const int64_t* lengths;        // [B] or null
    void* grad_receptance;         // [B,T,H,N]
    void* grad_log_decay;          // [B,T,H,N] wide
    void *grad_key, *grad_value;   // [B,T,H,N]
    double* grad_bonus;            // [B,H,N], to be summed over rows
    void* grad_state_in;           // [B,H,N,N] wide
};

struct Wkv6Kernels {
    void (*forward)(const Wkv6Forward&, Element, int threads);
    void (*backward)(const Wkv6Backward&, Element, int threads);
};

// There is one table per instruction set: the same source compiled with other flags.
extern const Wkv6Kernels wkv6_portable;
#if defined(RECEPTANCE_X86)
extern const Wkv6Kernels wkv6_avx2;
extern const Wkv6Kernels wkv6_avx512;
#endif

}  // namespace receptance
