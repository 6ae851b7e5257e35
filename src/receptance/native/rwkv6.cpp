// RWKV-5.2 and RWKV-6 from token ids to what goes into the head (see pass.h and recall.h).
//
// Time mixing of RWKV-6 has two parts more than that of other versions: a product of low rank with
// one mixture of the token shift, and five with its result, which decide about the other mixtures.

#include "rwkv6.h"

#include "kernels.h"
#include "recall.h"

namespace receptance {
namespace {

// ---- RWKV-5.2 -----------------------------------------------------------------------------------

struct Rwkv5Buffers : RecallBuffers {
    Rwkv5Buffers(Memory& memory, const Rwkv5Weights& w, int64_t positions, int threads)
        : RecallBuffers(memory, w, positions, threads, 4) {}
};

struct Rwkv5Worker : RecallWorker<Rwkv5Weights, Rwkv5Buffers> {
    using W = Rwkv5Weights;

    // share * now + (1 - share) * last.
    static constexpr auto kBlend = [](Float now, Float last, Float share) {
        return last + share * (now - last);
    };

    void time_mix(const Rwkv5Layer& l, int64_t layer) const {
        mix<4>(l.ln1_weight, l.ln1_bias, before(W::kTimeShift, layer), after(W::kTimeShift, layer),
               {l.mix_r, l.mix_k, l.mix_v, l.mix_g}, {&l.receptance, &l.key, &l.value, &l.gate},
               kBlend);
        const Matrix* const matrices[] = {&l.receptance, &l.key, &l.value, &l.gate};
        float* const to[] = {b.receptance, b.key, b.value, b.gate};
        share_tiles(matrices, [&](int i, Range tiles) {
            product(*matrices[i], tiles, own(b.mixed[i]), pass.positions,
                    [&](int64_t m, int64_t n, Float x) {
                        store(to[i] + m * b.stride + n, i == 3 ? silu(x) : x);
                    });
        });
        me.wait();
        read_heads(l, layer, head_channels(), [&](int64_t, int64_t c) { return l.log_decay + c; });
        add_output(l.output);
    }
    void channel_mix(const Rwkv5Layer& l, int64_t layer) const { mix_channels(l, layer, kBlend); }
};

// ---- RWKV-6 -------------------------------------------------------------------------------------

constexpr int kMixtures = 5;  // in the order of the factors: those of w, k, v, r, g
constexpr Matrix Rwkv6Layer::*kSecondFactors[kMixtures] = {
    &Rwkv6Layer::mix_w2_w, &Rwkv6Layer::mix_w2_k, &Rwkv6Layer::mix_w2_v, &Rwkv6Layer::mix_w2_r,
    &Rwkv6Layer::mix_w2_g};
constexpr const float* Rwkv6Layer::*kShares[kMixtures] = {
    &Rwkv6Layer::mix_w, &Rwkv6Layer::mix_k, &Rwkv6Layer::mix_v, &Rwkv6Layer::mix_r,
    &Rwkv6Layer::mix_g};
constexpr Matrix Rwkv6Layer::*kReaders[kMixtures] = {&Rwkv6Layer::decay_w1, &Rwkv6Layer::key,
                                                     &Rwkv6Layer::value, &Rwkv6Layer::receptance,
                                                     &Rwkv6Layer::gate};

struct Rwkv6Buffers : RecallBuffers {
    float *now, *last;  // the normalized inputs of every position, or of every thread for one
    float* log_decay;
    Activations mixing, decay;  // what the second factors multiply

    Rwkv6Buffers(Memory& memory, const Rwkv6Weights& w, int64_t positions, int threads)
        : RecallBuffers(memory, w, positions, threads, 1 + kMixtures) {
        const int64_t own = std::max<int64_t>(positions, threads);
        now = memory.take<float>(own * stride);
        last = memory.take<float>(own * stride);
        log_decay = memory.take<float>(positions * stride);
        mixing = take_low(memory, w, positions, &Rwkv6Layer::mix_w1);
        decay = take_low(memory, w, positions, &Rwkv6Layer::decay_w1);
    }
    static Activations take_low(Memory& memory, const Rwkv6Weights& w, int64_t positions,
                                Matrix Rwkv6Layer::*factor) {
        int64_t rank = 0;
        for (const Rwkv6Layer& l : w.layers) rank = std::max(rank, (l.*factor).outputs);
        const int64_t stride = round_up(rank, kOutputs);
        return {memory.take<float>(positions * stride), nullptr, nullptr, nullptr, stride};
    }
};

struct Rwkv6Worker : RecallWorker<Rwkv6Weights, Rwkv6Buffers> {
    using W = Rwkv6Weights;

    // share * last + (1 - share) * now: the other way round than in version 5.
    static constexpr auto kBlend = [](Float now, Float last, Float share) {
        return now + share * (last - now);
    };

    void time_mix(const Rwkv6Layer& l, int64_t layer) const {
        mix_tokens(l, layer);
        const Matrix* matrices[kMixtures];
        for (int i = 0; i < kMixtures; ++i) matrices[i] = &(l.*kReaders[i]);
        const Matrix* const (&readers)[kMixtures] = matrices;
        float* const to[] = {nullptr, b.key, b.value, b.receptance, b.gate};
        share_tiles(readers, [&](int i, Range tiles) {
            const Activations& low = b.decay;
            product(*readers[i], tiles, own_codes(b.mixed[1 + i]), pass.positions,
                    [&](int64_t m, int64_t n, Float x) {
                        if (i == 0) store(low.values + m * low.stride + n, tanh(x));
                        else store(to[i] + m * b.stride + n, i == 4 ? silu(x) : x);
                    });
        });
        me.wait();
        const Range channels = head_channels();
        if (channels.begin < channels.end) {
            const Range tiles{channels.begin / kOutputs, round_up(channels.end, kOutputs) / kOutputs};
            product(l.decay_w2, tiles, b.decay, pass.positions, [&](int64_t m, int64_t n, Float x) {
                store(b.log_decay + m * b.stride + n, -exp_of(load<Float>(l.decay + n) + x));
            });
            read_heads(l, layer, channels,
                       [&](int64_t p, int64_t c) { return b.log_decay + p * b.stride + c; });
        }
        add_output(l.output);
    }

    // Writes the five mixtures of each position with the one before it to b.mixed[1] and following,
    // encoded for the matrices that multiply them.
    void mix_tokens(const Rwkv6Layer& l, int64_t layer) const {
        shift(l.ln1_weight, l.ln1_bias, before(W::kTimeShift, layer), after(W::kTimeShift, layer),
              [&](int64_t p, const float* now, const float* last) {
                  const int64_t at = place(p) * b.stride;
                  std::memcpy(b.now + at, now, b.stride * sizeof(float));
                  std::memcpy(b.last + at, last, b.stride * sizeof(float));
                  blend_row(b.mixed[0], p, now, last, l.mix_x, l.mix_w1, kBlend);
              });
        multiply(l.mix_w1, b.mixed[0], [this](int64_t m, int64_t n, Float x) {
            store(b.mixing.values + m * b.mixing.stride + n, tanh(x));
        });
        me.wait();
        const Matrix* matrices[kMixtures];
        for (int i = 0; i < kMixtures; ++i) matrices[i] = &(l.*kSecondFactors[i]);
        const Matrix* const (&factors)[kMixtures] = matrices;
        share_tiles(factors, [&](int i, Range tiles) {
            Activations low = b.mixing;
            low.values += i * factors[i]->inputs;
            const Activations& to = b.mixed[1 + i];
            product(*factors[i], tiles, low, pass.positions, [&](int64_t m, int64_t n, Float x) {
                const int64_t at = place(m) * b.stride + n;
                const Float share = load<Float>(l.*kShares[i] + n) + x;
                store(to.values + m * to.stride + n,
                      kBlend(load<Float>(b.now + at), load<Float>(b.last + at), share));
            });
        });
        me.wait();
        const Range mine = positions();
        for (int i = 0; i < kMixtures; ++i)
            for (int64_t p = mine.begin; p < mine.end; ++p)
                encode_for_tiles(own_codes(b.mixed[1 + i]).row(p), w.width, l.*kReaders[i]);
        rows_done();
    }
    // Where a position's inputs are: each thread has its own copy of them if there is one position.
    int64_t place(int64_t p) const { return alone() ? me.id : p; }

    void channel_mix(const Rwkv6Layer& l, int64_t layer) const { mix_channels(l, layer, kBlend); }
};

}  // namespace

extern const Rwkv5Kernels RECEPTANCE_TABLE(rwkv5_) = {
    run_pass<Rwkv5Worker, Rwkv5Buffers, Rwkv5Weights>};
extern const Rwkv6Kernels RECEPTANCE_TABLE(rwkv6_) = {
    run_pass<Rwkv6Worker, Rwkv6Buffers, Rwkv6Weights>};

}  // namespace receptance
