// The interface of a whole RWKV-4 on a CPU, from token ids to what goes into the head. model/v4.py
// has the definition, quantize/packing.py the layouts of the matrices.
#pragma once

#include <atomic>
#include <cstdint>
#include <vector>

namespace receptance {

// The types of weights, in the order of KINDS in quantize/packing.py.
enum class Kind { float32, bfloat16, float16, int8, int4 };

struct Matrix {
    Kind kind;
    int64_t outputs, inputs;
    int64_t group;           // The number of inputs that share a scale; 0 for floats.
    const void* data;
    const uint16_t* params;  // Scales (and minima) as bfloat16; null for floats.
};

// Vectors are float32, padded with zeros to a multiple of kBlock in product.h.
struct LayerWeights {
    const float *ln1_weight, *ln1_bias, *ln2_weight, *ln2_bias;
    const float *log_decay, *bonus;
    const float *time_mix_k, *time_mix_v, *time_mix_r, *channel_mix_k, *channel_mix_r;
    Matrix key, value, receptance, output;      // These have the layout "tiles".
    Matrix ffn_key, ffn_receptance, ffn_value;  // So do these, but ffn_value has the layout "rows".
};

// How many vectors and matrices LayerWeights has, and Rwkv4Weights besides its layers.
constexpr int64_t kLayerVectors = 11, kLayerMatrices = 7, kOtherVectors = 4, kOtherMatrices = 2;

struct Rwkv4Weights {
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

// One call: rows of any lengths, one after another. Row b has positions [starts[b], starts[b + 1]).
struct Pass {
    int64_t rows, positions;
    const int64_t* starts;  // [B + 1]
    const int64_t* tokens;  // [positions]
    const bool* resets;     // [positions] or null
    StateParts before, after;  // They must not share memory.
    float* features;           // [positions][C]
    // The call counts here how many inputs of ffn.value were not zero, over all layers.
    std::atomic<int64_t> nonzero;
};

// The memory that one function works in, kept for its next call, and what it is divided for.
struct Workspace {
    std::vector<char> memory;
    int64_t positions = 0;
    int threads = 0;
};

struct Rwkv4Kernels {
    const char* name;
    void (*features)(const Rwkv4Weights&, Pass&, Workspace&, int threads);
    // Multiplies features [count][C] with the head: [count][V].
    void (*head)(const Rwkv4Weights&, const float* features, int64_t count, float* logits,
                 Workspace&, int threads);
    // Reads an array once: no product with weights of that size can take less time.
    uint32_t (*read)(const char* data, int64_t bytes, int threads);
};

extern const Rwkv4Kernels rwkv4_portable;
#if defined(RECEPTANCE_X86)
extern const Rwkv4Kernels rwkv4_avx2;
extern const Rwkv4Kernels rwkv4_avx512;
extern const Rwkv4Kernels rwkv4_avx512vnni;
#endif

}  // namespace receptance
