// What the passes of all versions share, from token ids to what goes into the head, on one team of
// threads for a whole pass.
//
// Work alternates between rows (layer norm, token shift and the encoding of activations, which
// threads share by position) and matrices (which they share by output), with a barrier after each.
// A pass over a single position has no barrier after work on rows: every thread does that small
// amount of work for itself.
#pragma once

#include <cstring>

#include "memory.h"
#include "model.h"
#include "product.h"
#include "sparse.h"

namespace receptance {
namespace {

// 1 / (1 + e^-x).
inline Float sigmoid(Float x) {
    const Float small = exp_nonpositive(minus_abs(x));
    return (x > 0 ? Float{} + 1 : small) / (small + 1);
}

// (e^x - e^-x) / (e^x + e^-x).
inline Float tanh(Float x) {
    const Float size = expm1_nonpositive(minus_abs(x) * 2);
    const Float tanh = -size / (size + 2);
    return x < 0 ? -tanh : tanh;
}

// Adds term(x) for all numbers of x[0, count) in one order, whatever the width of a vector.
template <class Term>
inline float sum_of_terms(const float* x, int64_t count, const Term& term) {
    OutputVectors sums{};
    int64_t c = 0;
    for (; c + kOutputs <= count; c += kOutputs)
        for (int v = 0; v < kVectors; ++v)
            sums[v] += term(load<Float>(x + c + v * RECEPTANCE_LANES));
    float sum = sum_of(sums);
    for (; c < count; ++c) sum += term(x[c]);
    return sum;
}

// What a norm takes from numbers and multiplies them by: the mean, and 1 / the standard deviation.
struct Moments {
    float mean, inverse;

    Moments(const float* x, int64_t count, float epsilon) {
        mean = sum_of_terms(x, count, [](auto v) { return v; }) / (float)count;
        const auto square = [this](auto v) { return (v - mean) * (v - mean); };
        inverse = 1 / std::sqrt(sum_of_terms(x, count, square) / (float)count + epsilon);
    }
};

// Writes the layer norm of x[0, width): mean 0 and variance 1, times weight, plus bias. Zeros
// follow up to `stride`.
inline void layer_norm(const float* x, const float* weight, const float* bias, int64_t width,
                       int64_t stride, float epsilon, float* out) {
    const Moments of(x, width, epsilon);
    for (int64_t c = 0; c < stride; c += RECEPTANCE_LANES) {
        const Float centered = (load<Float>(x + c) - of.mean) * of.inverse;
        store(out + c, centered * load<Float>(weight + c) + load<Float>(bias + c));
    }
    // Weight and bias are padded with zeros, so this changes something only if the mean is not
    // finite.
    std::memset(out + width, 0, (stride - width) * sizeof(float));
}

inline Activations take_activations(Memory& memory, int64_t rows, int64_t stride) {
    return {memory.take<float>(rows * stride), memory.take<int16_t>(rows * stride),
            memory.take<float>(rows * (stride / kBlock)), memory.take<float>(rows * (stride / 32)),
            stride};
}

// Memory for what a number of positions and threads needs. It is cleared whenever one of them
// changes, because the padding of vectors is read and must be zero, and other numbers divide the
// memory differently even where they need the same number of bytes.
inline char* reserve(Workspace& workspace, int64_t bytes, int64_t positions, int threads) {
    if (workspace.positions != positions || workspace.threads != threads) {
        workspace.memory.assign(bytes, 0);
        workspace.positions = positions;
        workspace.threads = threads;
    }
    return workspace.memory.data();
}

// What every version works in. Vectors of all positions are [positions][stride].
struct PassBuffers {
    int64_t stride;
    float* x;      // the residual stream
    float* added;  // what ffn.value adds to it
    float* normed;
    Activations mixed[6];
    Activations gated;   // what att.output multiplies
    Activations hidden;  // what ffn.value multiplies
    Scratch scratch;     // The product with ffn.value works in it.
    int64_t* row_of;     // It holds the row of every position.

    // `mixtures` is the number of mixtures of the token shift that a layer needs at a time.
    PassBuffers(Memory& memory, const OuterWeights& w, int64_t positions, int threads, int mixtures)
        : stride(round_up(w.width, kBlock)) {
        const int64_t own = std::max<int64_t>(positions, threads);
        x = memory.take<float>(positions * stride);
        added = memory.take<float>(positions * stride);
        normed = memory.take<float>(2 * threads * stride);
        for (int i = 0; i < mixtures; ++i) mixed[i] = take_activations(memory, own, stride);
        gated = take_activations(memory, own, stride);
        hidden = take_activations(memory, own, round_up(w.ffn_width, kBlock));
        scratch = {memory.take<float>(kSparseRows * stride),
                   memory.take<char>(threads * (round_up(w.width, kColumns) / kColumns) * kPartial),
                   stride};
        row_of = memory.take<int64_t>(positions);
    }
};

// One thread's view of a pass. A version derives from it and adds time_mix and channel_mix.
template <class Weights, class Buffers>
struct PassWorker {
    const Weights& w;
    Pass& pass;
    const Buffers& b;
    Member me;

    bool alone() const { return pass.positions == 1; }
    // Waits after work on rows until the rows of all threads are done.
    void rows_done() const {
        if (!alone()) me.wait();
    }
    Range positions() const { return alone() ? Range{0, 1} : me.share(pass.positions); }
    // Activations that this thread works with: its own copy where there is a single position.
    Activations own(const Activations& a) const { return alone() ? a.row(me.id) : a; }
    // The same with values that all threads share: only codes, scales and sums are its own.
    Activations own_codes(const Activations& a) const {
        Activations mine = own(a);
        mine.values = a.values;
        return mine;
    }

    static int64_t tiles_of(const Matrix& m) { return round_up(m.outputs, kOutputs) / kOutputs; }
    Range tiles(const Matrix& m) const { return me.share(tiles_of(m)); }
    // Calls work(i, tiles) for this thread's share of the tiles of several matrices together.
    template <int N, class Work>
    void share_tiles(const Matrix* const (&matrices)[N], const Work& work) const {
        int64_t total = 0, first = 0;
        for (const Matrix* m : matrices) total += tiles_of(*m);
        const Range mine = me.share(total);
        for (int i = 0; i < N; ++i) {
            const int64_t count = tiles_of(*matrices[i]);
            const Range own{std::max<int64_t>(mine.begin - first, 0),
                            std::min(mine.end - first, count)};
            if (own.begin < own.end) work(i, own);
            first += count;
        }
    }

    // The part of a state that belongs to a layer, before and after the pass: [rows][size].
    const float* before(int part, int64_t layer) const {
        return pass.state[part].before + layer * pass.rows * pass.state[part].size;
    }
    float* after(int part, int64_t layer) const {
        return pass.state[part].after + layer * pass.rows * pass.state[part].size;
    }

    void embed() const {
        const Range mine = me.share(pass.positions);
        float* row = b.normed + 2 * me.id * b.stride;
        for (int64_t p = mine.begin; p < mine.end; ++p) {
            look_up(w.embedding, pass.tokens[p], row);
            layer_norm(row, w.ln0_weight, w.ln0_bias, w.width, b.stride, w.epsilon,
                       b.x + p * b.stride);
        }
        me.wait();
    }

    // Layer norm and token shift: calls use(p, now, last) for each position with its normalized
    // input and that of the one before it.
    template <class Use>
    void shift(const float* weight, const float* bias, const float* before, float* after,
               const Use& use) const {
        const Range mine = positions();
        float *now = b.normed + 2 * me.id * b.stride, *last = now + b.stride;
        for (int64_t p = mine.begin; p < mine.end; ++p) {
            const int64_t row = b.row_of[p];
            if (pass.resets && pass.resets[p]) {
                std::memset(last, 0, b.stride * sizeof(float));
            } else if (p == pass.starts[row]) {
                std::memcpy(last, before + row * w.width, w.width * sizeof(float));
            } else if (p == mine.begin) {
                layer_norm(b.x + (p - 1) * b.stride, weight, bias, w.width, b.stride, w.epsilon,
                           last);
            }
            layer_norm(b.x + p * b.stride, weight, bias, w.width, b.stride, w.epsilon, now);
            use(p, now, last);
            if (p + 1 == pass.starts[row + 1] && me.id == (alone() ? 0 : me.id))
                std::memcpy(after + row * w.width, now, w.width * sizeof(float));
            std::swap(now, last);
        }
        rows_done();
    }

    // A mixture of a position with the one before it, encoded for the matrix that multiplies it.
    template <class Blend>
    void blend_row(const Activations& mixed, int64_t p, const float* now, const float* last,
                   const float* share, const Matrix& matrix, const Blend& blend) const {
        const Activations to = own(mixed).row(p);
        for (int64_t c = 0; c < b.stride; c += RECEPTANCE_LANES)
            store(to.values + c,
                  blend(load<Float>(now + c), load<Float>(last + c), load<Float>(share + c)));
        encode_for_tiles(to, w.width, matrix);
    }
    // Layer norm and token shift: the i-th mixture of each position with the one before it,
    // blend(now, last, share), goes to b.mixed[i].
    template <int N, class Blend>
    void mix(const float* weight, const float* bias, const float* before, float* after,
             const float* const (&shares)[N], const Matrix* const (&matrices)[N],
             const Blend& blend) const {
        shift(weight, bias, before, after, [&](int64_t p, const float* now, const float* last) {
            for (int i = 0; i < N; ++i)
                blend_row(b.mixed[i], p, now, last, shares[i], *matrices[i], blend);
        });
    }

    // Calls put(m, first output, vector) for this thread's outputs.
    template <class Put>
    void multiply(const Matrix& m, const Activations& a, const Put& put) const {
        product(m, tiles(m), own(a), pass.positions, put);
    }
    // What `multiply` may do with outputs: write them to vectors of all positions.
    auto into(float* to) const {
        return [this, to](int64_t m, int64_t n, Float x) { store(to + m * b.stride + n, x); };
    }

    // Multiplies b.gated, which all threads have written, and adds the product to the residual
    // stream.
    void add_output(const Matrix& output) const {
        me.wait();
        const Activations gated = own_codes(b.gated);
        const Range mine = positions();
        for (int64_t p = mine.begin; p < mine.end; ++p)
            encode_for_tiles(gated.row(p), w.width, output);
        rows_done();
        product(output, tiles(output), gated, pass.positions, [this](int64_t m, int64_t n, Float x) {
            float* to = b.x + m * b.stride + n;
            store(to, load<Float>(to) + x);
        });
        me.wait();
    }

    // b.hidden = relu(key * mixture)^2, for this thread's outputs.
    void squared_relu(const Matrix& key, const Activations& mixture) const {
        multiply(key, mixture, [this](int64_t m, int64_t n, Float x) {
            const Float positive = x < 0 ? Float{} : x;  // A NaN stays NaN.
            store(b.hidden.values + m * b.hidden.stride + n, positive * positive);
        });
    }
    // Multiplies b.hidden, which all threads have written, into b.added, without what is zero;
    // returns the columns that this thread computed.
    Range multiply_hidden(const Matrix& value) const {
        me.wait();
        const Activations hidden = own_codes(b.hidden);
        const Range mine = positions();
        int64_t nonzero = 0;
        for (int64_t p = mine.begin; p < mine.end; ++p) {
            encode_for_rows(hidden.row(p), w.ffn_width, value);
            nonzero += count_nonzero(hidden.row(p).values, w.ffn_width);
        }
        if (!alone() || me.id == 0) pass.nonzero += nonzero;
        rows_done();
        sparse_product(value, me, hidden, pass.positions, b.added, b.stride, b.scratch);
        return me.share(round_up(w.width, kColumns), kColumns);
    }

    void finish() const {
        const Range mine = me.share(pass.positions);
        float* row = b.normed + 2 * me.id * b.stride;
        for (int64_t p = mine.begin; p < mine.end; ++p) {
            layer_norm(b.x + p * b.stride, w.ln_out_weight, w.ln_out_bias, w.width, b.stride,
                       w.final_epsilon, row);
            std::memcpy(pass.features + p * w.width, row, w.width * sizeof(float));
        }
    }
};

// Copies the states of rows that read no token.
inline void keep_states(const Pass& pass, int64_t layers) {
    for (int64_t row = 0; row < pass.rows; ++row) {
        if (pass.starts[row] != pass.starts[row + 1]) continue;
        for (const StatePart& part : pass.state)
            for (int64_t layer = 0; layer < layers; ++layer) {
                const int64_t at = (layer * pass.rows + row) * part.size;
                std::memcpy(part.after + at, part.before + at, part.size * sizeof(float));
            }
    }
}

// Runs a pass with the workers of a version: Worker{weights, pass, buffers, member}.
template <class Worker, class Buffers, class Weights>
void run_pass(const Weights& w, Pass& pass, Workspace& workspace, int threads) {
    const int64_t layers = (int64_t)w.layers.size();
    keep_states(pass, layers);
    pass.nonzero = 0;
    if (!pass.positions) return;
    Memory measure(nullptr);
    (void)Buffers(measure, w, pass.positions, threads);
    Memory memory(reserve(workspace, measure.used(), pass.positions, threads));
    const Buffers buffers(memory, w, pass.positions, threads);
    for (int64_t row = 0; row < pass.rows; ++row)
        for (int64_t p = pass.starts[row]; p < pass.starts[row + 1]; ++p) buffers.row_of[p] = row;
    run_team(threads, [&](Member me) {
        const Worker worker{{w, pass, buffers, me}};
        worker.embed();
        for (int64_t layer = 0; layer < layers; ++layer) {
            worker.time_mix(w.layers[layer], layer);
            worker.channel_mix(w.layers[layer], layer);
        }
        worker.finish();
    });
}

}  // namespace
}  // namespace receptance
