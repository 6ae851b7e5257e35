// WKV-4 on a CPU: what the kernels need and where they are. The mathematics is in ops/reference.py.
#pragma once

#include <cstdint>

namespace receptance {

// States at the start of every so many tokens are kept for the backward pass.
constexpr int64_t kChunk = 32;

enum class Element { float32, float64, bfloat16 };

// Raw pointers to contiguous memory. State is float (double for float64): `Wide` below.
struct Forward {
    int64_t batch, time, width;
    const void *log_decay, *bonus;                      // [C] Wide
    const void *key, *value;                            // [B,T,C]
    const void *numerator, *denominator, *exponent;     // [B,C] Wide
    const bool* resets;                                 // [B,T] or null
    const int64_t* lengths;                             // [B] or null
    void* out;                                          // [B,T,C]
    void *numerator_out, *denominator_out, *exponent_out;  // [B,C] Wide
    void* starts;                                       // [B,N,3,C] Wide
};

struct Backward {
    int64_t batch, time, width;
    const void* grad_out;                               // [B,T,C]
    const void *grad_numerator, *grad_denominator;      // [B,C] Wide
    const void *log_decay, *bonus;                      // [C] Wide
    const void *key, *value;                            // [B,T,C]
    const void* starts;                                 // [B,N,3,C] Wide
    const bool* resets;
    const int64_t* lengths;
    double *grad_log_decay, *grad_bonus;                // [B,C], to be summed over B
    void *grad_key, *grad_value;                        // [B,T,C]
    void *grad_numerator_in, *grad_denominator_in;      // [B,C] Wide
};

struct Kernels {
    const char* name;
    void (*forward)(const Forward&, Element, int threads);
    void (*backward)(const Backward&, Element, int threads);
};

// One per instruction set this was built for; the same source compiled with other flags.
extern const Kernels wkv4_portable;
#if defined(RECEPTANCE_X86)
extern const Kernels wkv4_avx2;
extern const Kernels wkv4_avx512;
extern const Kernels wkv4_avx512vnni;
#endif

}  // namespace receptance
