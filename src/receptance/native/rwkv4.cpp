// RWKV-4 from token ids to what goes into the head (see pass.h).

#include "rwkv4.h"

#include "kernels.h"
#include "pass.h"

namespace receptance {
namespace {

struct Rwkv4Buffers : PassBuffers {
    float *key, *value, *receptance;

    Rwkv4Buffers(Memory& memory, const Rwkv4Weights& w, int64_t positions, int threads)
        : PassBuffers(memory, w, positions, threads, 3) {
        for (float** vector : {&key, &value, &receptance})
            *vector = memory.take<float>(positions * stride);
    }
};

// share * now + (1 - share) * last.
constexpr auto blend = [](Float now, Float last, Float share) {
    return last + share * (now - last);
};

struct Rwkv4Worker : PassWorker<Rwkv4Weights, Rwkv4Buffers> {
    using W = Rwkv4Weights;

    void time_mix(const Rwkv4Layer& l, int64_t layer) const {
        mix<3>(l.ln1_weight, l.ln1_bias, before(W::kTimeShift, layer), after(W::kTimeShift, layer),
               {l.time_mix_k, l.time_mix_v, l.time_mix_r}, {&l.key, &l.value, &l.receptance}, blend);
        multiply(l.key, b.mixed[0], into(b.key));
        multiply(l.value, b.mixed[1], into(b.value));
        multiply(l.receptance, b.mixed[2], into(b.receptance));
        // This thread computed key, value and receptance of these channels, so it need not wait.
        for (Range t = tiles(l.key); t.begin < t.end; ++t.begin)
            average(l, layer, t.begin * kOutputs);
        add_output(l.output);
    }

    // Runs the recurrence of ops/reference.py over kOutputs channels from `first` on, for every
    // row.
    void average(const Rwkv4Layer& l, int64_t layer, int64_t first) const {
        for (int64_t row = 0; row < pass.rows; ++row) {
            if (pass.starts[row] == pass.starts[row + 1]) continue;
            OutputVectors a, d, o;
            for (int v = 0; v < kVectors; ++v) {
                const int64_t c = first + v * RECEPTANCE_LANES, n = real(c), s = row * w.width;
                a[v] = load<Float>(before(W::kNumerator, layer) + s + c, n);
                d[v] = load<Float>(before(W::kDenominator, layer) + s + c, n);
                o[v] = load<Float>(before(W::kExponent, layer) + s + c, n);
            }
            for (int64_t p = pass.starts[row]; p < pass.starts[row + 1]; ++p)
                for (int v = 0; v < kVectors; ++v) {
                    if (pass.resets && pass.resets[p]) {
                        a[v] = d[v] = Float{};
                        o[v] = broadcast(kEmptyExponent);
                    }
                    const int64_t c = first + v * RECEPTANCE_LANES, i = p * b.stride + c;
                    const Float k = load<Float>(b.key + i), x = load<Float>(b.value + i);
                    const Float one = broadcast(1.0f);
                    Float gap = o[v] - (load<Float>(l.bonus + c) + k);
                    Float small = exp_nonpositive(minus_abs(gap));
                    const Float past = gap > 0 ? one : small, present = gap > 0 ? small : one;
                    const Float mean = (a[v] * past + present * x) / (d[v] * past + present);
                    store(b.gated.values + i, sigmoid(load<Float>(b.receptance + i)) * mean);

                    const Float faded = o[v] + load<Float>(l.log_decay + c);
                    gap = faded - k;
                    small = exp_nonpositive(minus_abs(gap));
                    const Float keep = gap > 0 ? one : small, add = gap > 0 ? small : one;
                    a[v] = a[v] * keep + add * x;
                    d[v] = d[v] * keep + add;
                    o[v] = gap > 0 ? faded : k;
                }
            for (int v = 0; v < kVectors; ++v) {
                const int64_t c = first + v * RECEPTANCE_LANES, n = real(c), s = row * w.width;
                store(after(W::kNumerator, layer) + s + c, a[v], n);
                store(after(W::kDenominator, layer) + s + c, d[v], n);
                store(after(W::kExponent, layer) + s + c, o[v], n);
            }
        }
    }

    // How many lanes of a vector that begins at channel c are channels of the model.
    int64_t real(int64_t c) const {
        return std::max<int64_t>(0, std::min<int64_t>(RECEPTANCE_LANES, w.width - c));
    }

    void channel_mix(const Rwkv4Layer& l, int64_t layer) const {
        mix<2>(l.ln2_weight, l.ln2_bias, before(W::kChannelShift, layer),
               after(W::kChannelShift, layer), {l.channel_mix_k, l.channel_mix_r},
               {&l.ffn_key, &l.ffn_receptance}, blend);
        squared_relu(l.ffn_key, b.mixed[0]);
        multiply(l.ffn_receptance, b.mixed[1], [this](int64_t m, int64_t n, Float x) {
            store(b.receptance + m * b.stride + n, sigmoid(x));
        });
        const Range columns = multiply_hidden(l.ffn_value);
        for (int64_t p = 0; p < pass.positions; ++p)
            for (int64_t c = columns.begin; c < columns.end; c += RECEPTANCE_LANES) {
                const int64_t i = p * b.stride + c;
                const Float gate = load<Float>(b.receptance + i);
                store(b.x + i, load<Float>(b.x + i) + gate * load<Float>(b.added + i));
            }
        me.wait();
    }
};

}  // namespace

extern const Rwkv4Kernels RECEPTANCE_TABLE(rwkv4_) = {
    run_pass<Rwkv4Worker, Rwkv4Buffers, Rwkv4Weights>};

}  // namespace receptance
