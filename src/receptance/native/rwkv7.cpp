// RWKV-7 from token ids to what goes into the head (see pass.h).
//
// Time mixing has three parts between barriers: products with the inputs, in which threads share
// outputs; then the heads, each of which one thread takes from the products of low rank to the norm
// and the gate; then the product with the output matrix. A head's state is read and written once
// for a token, by the step that the operator takes too (delta.h).

#include "rwkv7.h"

#include <numeric>

#include "delta.h"
#include "kernels.h"
#include "pass.h"

namespace receptance {
namespace {

static_assert(kPanel == kOutputs, "a head's vectors are summed like the outputs of a tile");

constexpr float kLogFastestDecay = -0.606530659712633424f;  // -e^(-1/2)
constexpr float kSmallestNorm = 1e-12f;

// share * last + (1 - share) * now: the other way round than in version 4.
constexpr auto blend = [](Float now, Float last, Float share) {
    return now + share * (last - now);
};

// The products of low rank: the first factor of each, the mixture that it multiplies, and the second.
enum Low { kDecay, kRate, kFirstValue, kGate, kLows };
constexpr Matrix Rwkv7Layer::*kFirstFactors[kLows] = {&Rwkv7Layer::w1, &Rwkv7Layer::a1,
                                                      &Rwkv7Layer::v1, &Rwkv7Layer::g1};
// The mixtures of the token shift, in the order of b.mixed.
enum Mixture { kOfReceptance, kOfKey, kOfValue, kOfDecay, kOfRate, kOfGate, kMixtures };
constexpr Mixture kLowMixtures[kLows] = {kOfDecay, kOfRate, kOfValue, kOfGate};

// What a thread works in for one head: vectors of its channels, padded with zeros, and a state for
// sizes that would need padding where it lies.
struct HeadRoom {
    float *receptance, *fade, *key, *value, *removal, *replacement, *removed, *out, *terms, *state;

    HeadRoom(Memory& memory, int64_t side) {
        for (float** x : {&receptance, &fade, &key, &value, &removal, &replacement, &removed, &out,
                          &terms})
            *x = memory.take<float>(side);
        state = memory.take<float>(side * side);
    }
};

struct Rwkv7Buffers : PassBuffers {
    int64_t side;
    float *receptance, *key, *value, *first_value;  // first_value is that of the first layer.
    float *fade, *rate, *gate;  // from the products of low rank
    Activations low[kLows];     // what their second factors multiply
    char* rooms;                // a HeadRoom for every thread
    int64_t room_bytes;

    Rwkv7Buffers(Memory& memory, const Rwkv7Weights& w, int64_t positions, int threads)
        : PassBuffers(memory, w, positions, threads, kMixtures),
          side(padded_side(w.head_size)) {
        for (float** vector : {&receptance, &key, &value, &first_value, &fade, &rate, &gate})
            *vector = memory.take<float>(positions * stride);
        for (int i = 0; i < kLows; ++i) {
            int64_t rank = 0;
            for (const Rwkv7Layer& l : w.layers)
                rank = std::max(rank, (l.*kFirstFactors[i]).outputs);
            const int64_t stride = round_up(rank, kOutputs);
            low[i] = {memory.take<float>(positions * stride), nullptr, nullptr, nullptr, stride};
        }
        Memory measure(nullptr);
        (void)HeadRoom(measure, side);
        room_bytes = round_up(measure.used(), 64);
        rooms = memory.take<char>(threads * room_bytes);
    }
};

struct Rwkv7Worker : PassWorker<Rwkv7Weights, Rwkv7Buffers> {
    using W = Rwkv7Weights;

    void time_mix(const Rwkv7Layer& l, int64_t layer) const {
        mix<kMixtures>(l.ln1_weight, l.ln1_bias, before(W::kTimeShift, layer),
                       after(W::kTimeShift, layer),
                       {l.mix_r, l.mix_k, l.mix_v, l.mix_w, l.mix_a, l.mix_g},
                       {&l.receptance, &l.key, &l.value, &l.w1, &l.a1, &l.g1}, blend);
        const Matrix* const wide[] = {&l.receptance, &l.key, &l.value};
        float* const to[] = {b.receptance, b.key, b.value};
        share_tiles(wide, [&](int i, Range tiles) {
            product(*wide[i], tiles, own(b.mixed[i]), pass.positions, into(to[i]));
        });
        const Matrix* const narrow[] = {&l.w1, &l.a1, &l.v1, &l.g1};
        share_tiles(narrow, [&](int i, Range tiles) {
            const Activations& low = b.low[i];
            product(*narrow[i], tiles, own(b.mixed[kLowMixtures[i]]), pass.positions,
                    [&](int64_t m, int64_t n, Float x) {
                        const Float y = i == kDecay ? tanh(x) : i == kGate ? sigmoid(x) : x;
                        store(low.values + m * low.stride + n, y);
                    });
        });
        me.wait();

        // Heads are shared in pieces that are whole tiles.
        const int64_t piece = std::lcm(w.head_size, kOutputs);
        Range channels = me.share(round_up(w.width, piece), piece);
        channels.end = std::min(channels.end, w.width);
        if (channels.begin < channels.end) {
            finish_low(l, layer, channels);
            Memory memory(b.rooms + me.id * b.room_bytes);
            const HeadRoom room(memory, b.side);
            for (int64_t row = 0; row < pass.rows; ++row)
                for (int64_t c = channels.begin; c < channels.end; c += w.head_size)
                    if (pass.starts[row] < pass.starts[row + 1])
                        read_row(l, layer, row, c, room);
        }
        add_output(l.output);
    }

    // The second halves of the products of low rank, for some channels: decay, in-context learning
    // rate, gate, and the value as a mixture with that of the first layer.
    void finish_low(const Rwkv7Layer& l, int64_t layer, Range channels) const {
        const Range tiles{channels.begin / kOutputs, round_up(channels.end, kOutputs) / kOutputs};
        const auto multiply_low = [&](const Matrix& m, Low low, const auto& put) {
            product(m, tiles, b.low[low], pass.positions, [&](int64_t m, int64_t n, Float x) {
                put(m * b.stride + n, n, x);
            });
        };
        multiply_low(l.w2, kDecay, [&](int64_t i, int64_t c, Float x) {
            const Float share = sigmoid(load<Float>(l.w0 + c) + x);
            store(b.fade + i, expm1_nonpositive(share * kLogFastestDecay));
        });
        multiply_low(l.a2, kRate, [&](int64_t i, int64_t c, Float x) {
            store(b.rate + i, sigmoid(load<Float>(l.a0 + c) + x));
        });
        multiply_low(l.g2, kGate, [&](int64_t i, int64_t, Float x) { store(b.gate + i, x); });
        if (layer > 0) {
            multiply_low(l.v2, kFirstValue, [&](int64_t i, int64_t c, Float x) {
                const Float share = sigmoid(load<Float>(l.v0 + c) + x), v = load<Float>(b.value + i);
                store(b.value + i, v + (load<Float>(b.first_value + i) - v) * share);
            });
            return;
        }
        for (int64_t p = 0; p < pass.positions; ++p) {
            const int64_t i = p * b.stride + channels.begin;
            std::memcpy(b.first_value + i, b.value + i,
                        (channels.end - channels.begin) * sizeof(float));
        }
    }

    // Runs the recurrence over a row's positions for the head whose first channel is `first`.
    void read_row(const Rwkv7Layer& l, int64_t layer, int64_t row, int64_t first,
                  const HeadRoom& room) const {
        const int64_t size = w.head_size, side = b.side, at = (row * w.width + first) * size;
        const float* from = before(W::kWkv, layer) + at;
        float *const kept = after(W::kWkv, layer) + at, *to = kept;
        if (side != size) {
            std::memset(room.state, 0, side * side * sizeof(float));
            for (int64_t i = 0; i < size; ++i)
                std::memcpy(room.state + i * side, from + i * size, size * sizeof(float));
            from = to = room.state;
        }
        for (int64_t p = pass.starts[row]; p < pass.starts[row + 1]; ++p, from = to) {
            if (pass.resets && pass.resets[p]) {
                std::memset(to, 0, side * side * sizeof(float));
                from = to;
            }
            const int64_t i = p * b.stride + first;
            const float bonus = prepare(l, first, i, room);
            advance<Float, true>(from, to, side,
                                 Token<float>{room.receptance, room.fade, nullptr, room.key, room.value,
                                              room.removal, room.replacement},
                                 room.removed, room.out);
            const Moments of(room.out, size, w.norm_epsilon);
            for_head([&](int64_t c, int64_t n, int) {
                const Float centered = (load<Float>(room.out + c) - of.mean) * of.inverse;
                const Float normed = centered * load<Float>(l.norm_weight + first + c, n) +
                                     load<Float>(l.norm_bias + first + c, n);
                const Float out = normed + load<Float>(room.value + c) * bonus;
                store(b.gated.values + i + c, out * load<Float>(b.gate + i + c, n), n);
            });
        }
        if (side != size)
            for (int64_t i = 0; i < size; ++i)
                std::memcpy(kept + i * size, to + i * side, size * sizeof(float));
    }

    // Writes what the recurrence takes of one position's head, which begins at i in the vectors of
    // all positions; returns the bonus, by which the value is multiplied.
    float prepare(const Rwkv7Layer& l, int64_t first, int64_t i, const HeadRoom& room) const {
        OutputVectors squares{}, bonus{};
        for_head([&](int64_t c, int64_t n, int v) {
            const Float r = load<Float>(b.receptance + i + c, n);
            const Float k = load<Float>(b.key + i + c, n), rate = load<Float>(b.rate + i + c, n);
            const Float direction = k * load<Float>(l.k_k + first + c, n);
            const Float key = k * (1 + (rate - 1) * load<Float>(l.k_a + first + c, n));
            store(room.receptance + c, r);
            store(room.key + c, key);
            store(room.removal + c, direction);
            squares[v] += direction * direction;
            bonus[v] += r * key * load<Float>(l.r_k + first + c, n);
        });
        const float length = std::sqrt(sum_of(squares));
        const float norm = length < kSmallestNorm ? kSmallestNorm : length;  // A NaN stays NaN.
        for_head([&](int64_t c, int64_t n, int) {
            const Float direction = load<Float>(room.removal + c) / norm;
            store(room.removal + c, -direction);
            store(room.replacement + c, direction * load<Float>(b.rate + i + c, n));
            store(room.fade + c, load<Float>(b.fade + i + c, n));
            store(room.value + c, load<Float>(b.value + i + c, n));
        });
        return sum_of(bonus);
    }

    // Calls step(c, n, v) for every vector of a head, of which n lanes are channels of the head; v
    // counts the vectors modulo kVectors.
    template <class Step>
    void for_head(const Step& step) const {
        for (int64_t c = 0, v = 0; c < b.side; c += RECEPTANCE_LANES, v = (v + 1) % kVectors)
            step(c, std::max<int64_t>(0, std::min<int64_t>(RECEPTANCE_LANES, w.head_size - c)), v);
    }

    void channel_mix(const Rwkv7Layer& l, int64_t layer) const {
        mix<1>(l.ln2_weight, l.ln2_bias, before(W::kChannelShift, layer),
               after(W::kChannelShift, layer), {l.channel_mix_k}, {&l.ffn_key}, blend);
        squared_relu(l.ffn_key, b.mixed[0]);
        const Range columns = multiply_hidden(l.ffn_value);
        for (int64_t p = 0; p < pass.positions; ++p)
            for (int64_t c = columns.begin; c < columns.end; c += RECEPTANCE_LANES) {
                const int64_t i = p * b.stride + c;
                store(b.x + i, load<Float>(b.x + i) + load<Float>(b.added + i));
            }
        me.wait();
    }
};

}  // namespace

extern const Rwkv7Kernels RECEPTANCE_TABLE(rwkv7_) = {
    run_pass<Rwkv7Worker, Rwkv7Buffers, Rwkv7Weights>};

}  // namespace receptance
