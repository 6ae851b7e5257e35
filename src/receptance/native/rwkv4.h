// The interface of a whole RWKV-4 on a CPU, from token ids to what goes into the head. model/v4.py
// has the definition.
#pragma once

#include "model.h"

namespace receptance {

struct Rwkv4Layer {
    const float *ln1_weight, *ln1_bias, *ln2_weight, *ln2_bias;
    const float *log_decay, *bonus;
    const float *time_mix_k, *time_mix_v, *time_mix_r, *channel_mix_k, *channel_mix_r;
    Matrix key, value, receptance, output;      // These have the layout "tiles".
    Matrix ffn_key, ffn_receptance, ffn_value;  // So do these, but ffn_value has the layout "rows".
};

struct Rwkv4Weights : OuterWeights {
    using Layer = Rwkv4Layer;
    static constexpr const char* kName = "Rwkv4";
    static constexpr int kNumbers = 0;
    // The order in which Python hands over the weights of a layer.
    static constexpr const float* Layer::*kVectors[] = {
        &Layer::ln1_weight, &Layer::ln1_bias,   &Layer::ln2_weight,    &Layer::ln2_bias,
        &Layer::log_decay,  &Layer::bonus,      &Layer::time_mix_k,    &Layer::time_mix_v,
        &Layer::time_mix_r, &Layer::channel_mix_k, &Layer::channel_mix_r};
    static constexpr Matrix Layer::*kMatrices[] = {
        &Layer::key,     &Layer::value,          &Layer::receptance, &Layer::output,
        &Layer::ffn_key, &Layer::ffn_receptance, &Layer::ffn_value};
    // The tensors of a state, in the order of LayerState.
    enum Part { kTimeShift, kChannelShift, kNumerator, kDenominator, kExponent, kParts };

    std::vector<Layer> layers;

    void set_numbers(const std::vector<double>&) {}
    int64_t part_size(int) const { return width; }
};

struct Rwkv4Kernels {
    void (*features)(const Rwkv4Weights&, Pass&, Workspace&, int threads);
};

extern const Rwkv4Kernels rwkv4_portable;
#if defined(RECEPTANCE_X86)
extern const Rwkv4Kernels rwkv4_avx2;
extern const Rwkv4Kernels rwkv4_avxvnni;
extern const Rwkv4Kernels rwkv4_avx512;
extern const Rwkv4Kernels rwkv4_avx512vnni;
#endif

}  // namespace receptance
