// The interface of a whole RWKV-5.2 or RWKV-6 on a CPU, from token ids to what goes into the head.
// model/v5.py and model/v6.py have the definitions.
#pragma once

#include "model.h"

namespace receptance {

struct Rwkv5Layer {
    const float *ln1_weight, *ln1_bias, *ln2_weight, *ln2_bias;
    const float *mix_k, *mix_v, *mix_r, *mix_g;
    const float *log_decay, *bonus, *norm_weight, *norm_bias, *channel_mix_k, *channel_mix_r;
    Matrix receptance, key, value, gate, output;  // These have the layout "tiles".
    Matrix ffn_key, ffn_receptance, ffn_value;    // So do these, but ffn_value has "rows".
};

struct Rwkv6Layer {
    const float *ln1_weight, *ln1_bias, *ln2_weight, *ln2_bias;
    const float *mix_x, *mix_w, *mix_k, *mix_v, *mix_r, *mix_g;
    const float *decay;  // What is added to the product of low rank.
    const float *bonus, *norm_weight, *norm_bias, *channel_mix_k, *channel_mix_r;
    Matrix receptance, key, value, gate, output;  // These have the layout "tiles".
    Matrix ffn_key, ffn_receptance, ffn_value;    // So do these, but ffn_value has "rows".
    // The factors of the products of low rank, as floats in "tiles". The outputs of mix_w1 are the
    // inputs of the five that follow it, one after another.
    Matrix mix_w1, mix_w2_w, mix_w2_k, mix_w2_v, mix_w2_r, mix_w2_g, decay_w1, decay_w2;
};

// What the weights of both have besides their layers.
struct HeadedWeights : OuterWeights {
    static constexpr int kNumbers = 2;
    // The tensors of a state, in the order of LayerState.
    enum Part { kTimeShift, kChannelShift, kWkv, kParts };

    int64_t head_size;
    float norm_epsilon;  // of the norm of every head

    void set_numbers(const std::vector<double>& numbers) {
        head_size = (int64_t)numbers[0];
        norm_epsilon = (float)numbers[1];
    }
    int64_t part_size(int part) const { return part == kWkv ? width * head_size : width; }
};

struct Rwkv5Weights : HeadedWeights {
    using Layer = Rwkv5Layer;
    static constexpr const char* kName = "Rwkv5";
    // The order in which Python hands over the weights of a layer.
    static constexpr const float* Layer::*kVectors[] = {
        &Layer::ln1_weight, &Layer::ln1_bias,    &Layer::ln2_weight,    &Layer::ln2_bias,
        &Layer::mix_k,      &Layer::mix_v,       &Layer::mix_r,         &Layer::mix_g,
        &Layer::log_decay,  &Layer::bonus,       &Layer::norm_weight,   &Layer::norm_bias,
        &Layer::channel_mix_k, &Layer::channel_mix_r};
    static constexpr Matrix Layer::*kMatrices[] = {
        &Layer::receptance, &Layer::key,     &Layer::value,          &Layer::gate,
        &Layer::output,     &Layer::ffn_key, &Layer::ffn_receptance, &Layer::ffn_value};

    std::vector<Layer> layers;
};

struct Rwkv6Weights : HeadedWeights {
    using Layer = Rwkv6Layer;
    static constexpr const char* kName = "Rwkv6";
    static constexpr const float* Layer::*kVectors[] = {
        &Layer::ln1_weight,  &Layer::ln1_bias,      &Layer::ln2_weight,   &Layer::ln2_bias,
        &Layer::mix_x,       &Layer::mix_w,         &Layer::mix_k,        &Layer::mix_v,
        &Layer::mix_r,       &Layer::mix_g,         &Layer::decay,        &Layer::bonus,
        &Layer::norm_weight, &Layer::norm_bias,     &Layer::channel_mix_k,
        &Layer::channel_mix_r};
    static constexpr Matrix Layer::*kMatrices[] = {
        &Layer::receptance, &Layer::key,      &Layer::value,          &Layer::gate,
        &Layer::output,     &Layer::ffn_key,  &Layer::ffn_receptance, &Layer::ffn_value,
        &Layer::mix_w1,     &Layer::mix_w2_w, &Layer::mix_w2_k,       &Layer::mix_w2_v,
        &Layer::mix_w2_r,   &Layer::mix_w2_g, &Layer::decay_w1,       &Layer::decay_w2};

    std::vector<Layer> layers;
};

struct Rwkv5Kernels {
    void (*features)(const Rwkv5Weights&, Pass&, Workspace&, int threads);
};
struct Rwkv6Kernels {
    void (*features)(const Rwkv6Weights&, Pass&, Workspace&, int threads);
};

extern const Rwkv5Kernels rwkv5_portable;
extern const Rwkv6Kernels rwkv6_portable;
#if defined(RECEPTANCE_X86)
extern const Rwkv5Kernels rwkv5_avx2;
extern const Rwkv5Kernels rwkv5_avxvnni;
extern const Rwkv5Kernels rwkv5_avx512;
extern const Rwkv5Kernels rwkv5_avx512vnni;
extern const Rwkv6Kernels rwkv6_avx2;
extern const Rwkv6Kernels rwkv6_avxvnni;
extern const Rwkv6Kernels rwkv6_avx512;
extern const Rwkv6Kernels rwkv6_avx512vnni;
#endif

}  // namespace receptance
