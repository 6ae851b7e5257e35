// A whole RWKV-4 on a CPU, from token ids to what goes into the head. The definition is in
// model/v4.py; the layouts of the matrices are in engine/packing.py.
#pragma once

#include <atomic>
#include <cstdint>
#include <vector>

namespace receptance {

// In the order of KINDS in engine/packing.py.
enum class Weight { float32, bfloat16, float16, int8, int4 };

struct Matrix {
    Weight kind;
    int64_t outputs, inputs;
    int64_t group;           // inputs that share a scale; 0 for floats
    const void* data;
    const uint16_t* params;  // bfloat16; null for floats
};

// Vectors are float32 and padded with zeros to a multiple of 128.
struct LayerWeights {
    const float *ln1_weight, *ln1_bias, *ln2_weight, *ln2_bias;
    const float *log_decay, *bonus;
    const float *time_mix_k, *time_mix_v, *time_mix_r, *channel_mix_k, *channel_mix_r;
    Matrix key, value, receptance, output;          // in tiles
    Matrix ffn_key, ffn_receptance, ffn_value;      // in tiles, the last one in rows
};

struct Weights {
    int64_t width, ffn_width, vocab_size;
    float epsilon, final_epsilon;
    Matrix embedding, head;
    const float *ln0_weight, *ln0_bias, *ln_out_weight, *ln_out_bias;
    std::vector<LayerWeights> layers;
};

// The five tensors of a state, each [L,B,C] float32.
struct StateParts {
    float *time_shift, *channel_shift, *numerator, *denominator, *exponent;
};

// Rows of any lengths, one after another: row b has positions [starts[b], starts[b + 1]).
struct Pass {
    int64_t rows, positions;
    const int64_t* starts;  // [B + 1]
    const int64_t* tokens;  // [positions]
    const bool* resets;     // [positions] or null
    StateParts before, after;  // not the same memory
    float* features;           // [positions][C]
    std::atomic<int64_t> nonzero;  // out: inputs of ffn.value that were not zero, over all layers
};

// Memory that one function works in, kept for its next call.
struct Workspace {
    std::vector<char> memory;
};

struct Rwkv4Kernels {
    const char* name;
    void (*features)(const Weights&, Pass&, Workspace&, int threads);
    // [count][C] -> [count][V]
    void (*head)(const Weights&, const float* features, int64_t count, float* logits, Workspace&,
                 int threads);
    // Reads an array once: the time that this takes is the least for weights of that size.
    uint32_t (*read)(const char* data, int64_t bytes, int threads);
};

extern const Rwkv4Kernels rwkv4_portable;
#if defined(RECEPTANCE_X86)
extern const Rwkv4Kernels rwkv4_avx2;
extern const Rwkv4Kernels rwkv4_avx512;
extern const Rwkv4Kernels rwkv4_avx512vnni;
#endif

}  // namespace receptance
