// What RWKV-5 and RWKV-6 share of a pass: the heads, and channel mixing (see pass.h).
#pragma once

#include <numeric>

#include "fading.h"
#include "heads.h"
#include "pass.h"

namespace receptance {
namespace {

static_assert(kPanel == kOutputs, "a head's vectors are summed like the outputs of a tile");

// e^x for any x. A NaN stays NaN.
inline Float exp_of(Float x) {
    const Float small = exp_nonpositive(minus_abs(x));
    return x > 0 ? 1 / small : small;
}

inline Float silu(Float x) { return x * sigmoid(x); }

// What a thread works in for one head: vectors of its channels, padded with zeros, and a state for
// sizes that would need padding where it lies.
struct RecallRoom {
    float *receptance, *fade, *base, *key, *value, *out, *state;

    RecallRoom(Memory& memory, int64_t side) {
        for (float** x : {&receptance, &fade, &base, &key, &value, &out})
            *x = memory.take<float>(side);
        state = memory.take<float>(side * side);
    }
};

struct RecallBuffers : PassBuffers {
    int64_t side;
    float *receptance, *key, *value, *gate;  // gate is silu(W_g x), or sigmoid(W'_r x).
    char* rooms;                             // a RecallRoom for every thread
    int64_t room_bytes;

    template <class Weights>
    RecallBuffers(Memory& memory, const Weights& w, int64_t positions, int threads, int mixtures)
        : PassBuffers(memory, w, positions, threads, mixtures), side(padded_side(w.head_size)) {
        for (float** vector : {&receptance, &key, &value, &gate})
            *vector = memory.take<float>(positions * stride);
        Memory measure(nullptr);
        (void)RecallRoom(measure, side);
        room_bytes = round_up(measure.used(), 64);
        rooms = memory.take<char>(threads * room_bytes);
    }
};

template <class Weights, class Buffers>
struct RecallWorker : PassWorker<Weights, Buffers> {
    using Base = PassWorker<Weights, Buffers>;
    using Layer = typename Weights::Layer;
    using Base::after, Base::b, Base::before, Base::me, Base::pass, Base::w;

    // The channels whose heads this thread reads: heads are shared in pieces that are whole tiles.
    Range head_channels() const {
        const int64_t piece = std::lcm(w.head_size, kOutputs);
        Range channels = me.share(round_up(w.width, piece), piece);
        channels.end = std::min(channels.end, w.width);
        return channels;
    }

    // Runs the recurrence for this thread's heads. decays(p, c) gives the logarithms of the decays
    // at a position from channel c on.
    template <class Decays>
    void read_heads(const Layer& l, int64_t layer, Range channels, const Decays& decays) const {
        if (channels.begin >= channels.end) return;
        Memory memory(b.rooms + me.id * b.room_bytes);
        const RecallRoom room(memory, b.side);
        for (int64_t row = 0; row < pass.rows; ++row)
            for (int64_t c = channels.begin; c < channels.end; c += w.head_size)
                if (pass.starts[row] < pass.starts[row + 1]) read_row(l, layer, row, c, room, decays);
    }

    // Runs the recurrence over a row's positions for the head whose first channel is `first`.
    template <class Decays>
    void read_row(const Layer& l, int64_t layer, int64_t row, int64_t first, const RecallRoom& room,
                  const Decays& decays) const {
        const int64_t size = w.head_size, side = b.side, at = (row * w.width + first) * size;
        const float* from = before(Weights::kWkv, layer) + at;
        float *const kept = after(Weights::kWkv, layer) + at, *to = kept;
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
            OutputVectors own{};
            for_head([&](int64_t c, int64_t n, int v) {
                const Float r = load<Float>(b.receptance + i + c, n);
                const Float k = load<Float>(b.key + i + c, n);
                own[v] += r * load<Float>(l.bonus + first + c, n) * k;
                store(room.receptance + c, r);
                store(room.key + c, k);
                store(room.value + c, load<Float>(b.value + i + c, n));
                store(room.fade + c, load<Float>(decays(p, first) + c, n));
            });
            const bool strong = split_decay<Float>(side, room.fade, room.base);
            fade_and_add<Float, true>(from, to, side,
                                      FadingToken<float>{room.receptance, room.fade,
                                                         strong ? room.base : nullptr, room.key,
                                                         room.value},
                                      sum_of(own), room.out);
            const Moments of(room.out, size, w.norm_epsilon);
            for_head([&](int64_t c, int64_t n, int) {
                const Float centered = (load<Float>(room.out + c) - of.mean) * of.inverse;
                const Float normed = centered * load<Float>(l.norm_weight + first + c, n) +
                                     load<Float>(l.norm_bias + first + c, n);
                store(b.gated.values + i + c, normed * load<Float>(b.gate + i + c, n), n);
            });
        }
        if (side != size)
            for (int64_t i = 0; i < size; ++i)
                std::memcpy(kept + i * size, to + i * side, size * sizeof(float));
    }

    // Calls step(c, n, v) for every vector of a head, of which n lanes are channels of the head; v
    // counts the vectors modulo kVectors.
    template <class Step>
    void for_head(const Step& step) const {
        for (int64_t c = 0, v = 0; c < b.side; c += RECEPTANCE_LANES, v = (v + 1) % kVectors)
            step(c, std::max<int64_t>(0, std::min<int64_t>(RECEPTANCE_LANES, w.head_size - c)), v);
    }

    template <class Blend>
    void mix_channels(const Layer& l, int64_t layer, const Blend& blend) const {
        this->template mix<2>(l.ln2_weight, l.ln2_bias, before(Weights::kChannelShift, layer),
                              after(Weights::kChannelShift, layer),
                              {l.channel_mix_k, l.channel_mix_r}, {&l.ffn_key, &l.ffn_receptance},
                              blend);
        this->squared_relu(l.ffn_key, b.mixed[0]);
        this->multiply(l.ffn_receptance, b.mixed[1], [this](int64_t m, int64_t n, Float x) {
            store(b.gate + m * b.stride + n, sigmoid(x));
        });
        const Range columns = this->multiply_hidden(l.ffn_value);
        for (int64_t p = 0; p < pass.positions; ++p)
            for (int64_t c = columns.begin; c < columns.end; c += RECEPTANCE_LANES) {
                const int64_t i = p * b.stride + c;
                const Float gate = load<Float>(b.gate + i);
                store(b.x + i, load<Float>(b.x + i) + gate * load<Float>(b.added + i));
            }
        me.wait();
    }
};

}  // namespace
}  // namespace receptance
