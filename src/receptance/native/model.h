// What the whole models of all versions share on a CPU: matrices, and what a call reads and writes.
// quantize/packing.py describes the layouts of the matrices.
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

// The sizes of a model, and the weights outside its blocks. Vectors are float32, here and in the
// blocks, padded with zeros to a multiple of kBlock in product.h.
struct OuterWeights {
    int64_t width, ffn_width, vocab_size;
    float epsilon, final_epsilon;
    Matrix embedding, head;
    const float *ln0_weight, *ln0_bias, *ln_out_weight, *ln_out_bias;
};

// A tensor of a state, [L,B,size] float32, before a pass and after it. The two share no memory.
struct StatePart {
    const float* before;
    float* after;
    int64_t size;
};

// One call: rows of any lengths, one after another. Row b has positions [starts[b], starts[b + 1]).
struct Pass {
    int64_t rows, positions;
    const int64_t* starts;  // [B + 1]
    const int64_t* tokens;  // [positions]
    const bool* resets;     // [positions] or null
    std::vector<StatePart> state;  // In the order of the fields of the version's LayerState.
    float* features;               // [positions][C]
    // The call counts here how many inputs of ffn.value were not zero, over all layers.
    std::atomic<int64_t> nonzero;
};

// The memory that one function works in, kept for its next call, and what it is divided for.
struct Workspace {
    std::vector<char> memory;
    int64_t positions = 0;
    int threads = 0;
};

struct ModelKernels {
    // Multiplies features [count][C] with the head: [count][V].
    void (*head)(const OuterWeights&, const float* features, int64_t count, float* logits,
                 Workspace&, int threads);
    // Reads an array once: no product with weights of that size can take less time.
    uint32_t (*read)(const char* data, int64_t bytes, int threads);
};

extern const ModelKernels model_portable;
#if defined(RECEPTANCE_X86)
extern const ModelKernels model_avx2;
extern const ModelKernels model_avxvnni;
extern const ModelKernels model_avx512;
extern const ModelKernels model_avx512vnni;
#endif

}  // namespace receptance
