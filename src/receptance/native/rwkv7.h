// The interface of a whole RWKV-7 on a CPU, from token ids to what goes into the head. model/v7.py
// has the definition.
#pragma once

#include "model.h"

namespace receptance {

struct Rwkv7Layer {
    const float *ln1_weight, *ln1_bias, *ln2_weight, *ln2_bias;
    const float *mix_r, *mix_w, *mix_k, *mix_v, *mix_a, *mix_g;
    const float *w0, *a0, *v0;  // What is added to the products of low rank.
    const float *k_k, *k_a, *r_k, *norm_weight, *norm_bias, *channel_mix_k;
    Matrix receptance, key, value, output;  // These have the layout "tiles".
    Matrix ffn_key, ffn_value;              // So has ffn_key; ffn_value has the layout "rows".
    // The factors of the products of low rank, as floats in "tiles". Those of the first layer's
    // value are never used.
    Matrix w1, w2, a1, a2, v1, v2, g1, g2;
};

struct Rwkv7Weights : OuterWeights {
    using Layer = Rwkv7Layer;
    static constexpr const char* kName = "Rwkv7";
    static constexpr int kNumbers = 2;
    // The order in which Python hands over the weights of a layer.
    static constexpr const float* Layer::*kVectors[] = {
        &Layer::ln1_weight, &Layer::ln1_bias,    &Layer::ln2_weight, &Layer::ln2_bias,
        &Layer::mix_r,      &Layer::mix_w,       &Layer::mix_k,      &Layer::mix_v,
        &Layer::mix_a,      &Layer::mix_g,       &Layer::w0,         &Layer::a0,
        &Layer::v0,         &Layer::k_k,         &Layer::k_a,        &Layer::r_k,
        &Layer::norm_weight, &Layer::norm_bias,  &Layer::channel_mix_k};
    static constexpr Matrix Layer::*kMatrices[] = {
        &Layer::receptance, &Layer::key, &Layer::value, &Layer::output, &Layer::ffn_key,
        &Layer::ffn_value,  &Layer::w1,  &Layer::w2,    &Layer::a1,     &Layer::a2,
        &Layer::v1,         &Layer::v2,  &Layer::g1,    &Layer::g2};
    // The tensors of a state, in the order of LayerState.
    enum Part { kTimeShift, kChannelShift, kWkv, kParts };

    int64_t head_size;
    float norm_epsilon;  // of the norm of every head
    std::vector<Layer> layers;

    void set_numbers(const std::vector<double>& numbers) {
        head_size = (int64_t)numbers[0];
        norm_epsilon = (float)numbers[1];
    }
    int64_t part_size(int part) const { return part == kWkv ? width * head_size : width; }
};

struct Rwkv7Kernels {
    void (*features)(const Rwkv7Weights&, Pass&, Workspace&, int threads);
};

extern const Rwkv7Kernels rwkv7_portable;
#if defined(RECEPTANCE_X86)
extern const Rwkv7Kernels rwkv7_avx2;
extern const Rwkv7Kernels rwkv7_avxvnni;
extern const Rwkv7Kernels rwkv7_avx512;
extern const Rwkv7Kernels rwkv7_avx512vnni;
#endif

}  // namespace receptance
