// RWKV-4 from token ids to what goes into the head, on one team of threads for a whole pass.
//
// Work alternates between rows (layer norm, token shift and the encoding of activations, which
// threads share by position) and matrices (which they share by output), with a barrier after each.
// A pass over a single position has no barrier after work on rows: every thread does that small
// amount of work for itself.

#include "rwkv4.h"

#include "kernels.h"
#include "product.h"
#include "sparse.h"

namespace receptance {
namespace {

// 1 / (1 + e^-x).
inline Float sigmoid(Float x) {
    const Float small = exp_nonpositive(minus_abs(x));
    return (x > 0 ? Float{} + 1 : small) / (small + 1);
}

// Writes the layer norm of x[0, width): mean 0 and variance 1, times weight, plus bias. Zeros
// follow up to `stride`.
void layer_norm(const float* x, const float* weight, const float* bias, int64_t width,
                int64_t stride, float epsilon, float* out) {
    const auto total = [&](const auto& term) {
        OutputVectors sums{};
        int64_t c = 0;
        for (; c + kOutputs <= width; c += kOutputs)
            for (int v = 0; v < kVectors; ++v)
                sums[v] += term(load<Float>(x + c + v * RECEPTANCE_LANES));
        float sum = sum_of(sums);
        for (; c < width; ++c) sum += term(x[c]);
        return sum;
    };
    const float mean = total([](auto v) { return v; }) / (float)width;
    const float variance = total([mean](auto v) { return (v - mean) * (v - mean); }) / (float)width;
    const float inverse = 1 / std::sqrt(variance + epsilon);
    for (int64_t c = 0; c < stride; c += RECEPTANCE_LANES) {
        const Float centered = (load<Float>(x + c) - mean) * inverse;
        store(out + c, centered * load<Float>(weight + c) + load<Float>(bias + c));
    }
    // Weight and bias are padded with zeros, so this changes something only if the mean is not
    // finite.
    std::memset(out + width, 0, (stride - width) * sizeof(float));
}

// Hands out pieces of memory that are aligned to cache lines.
class Memory {
public:
    explicit Memory(char* base) : base_((uintptr_t)base), at_(base_) {}
    template <class T>
    T* take(int64_t count) {
        at_ = (at_ + 63) / 64 * 64;
        T* const taken = (T*)at_;
        at_ += count * sizeof(T);
        return taken;
    }
    int64_t used() const { return (int64_t)(at_ - base_); }

private:
    uintptr_t base_, at_;
};

Activations take_activations(Memory& memory, int64_t rows, int64_t stride) {
    return {memory.take<float>(rows * stride), memory.take<int16_t>(rows * stride),
            memory.take<float>(rows * (stride / kBlock)), memory.take<float>(rows * (stride / 32)),
            stride};
}

struct Buffers {
    int64_t stride;
    float *x, *key, *value, *receptance, *normed;
    Activations mixed[3], average, hidden;
    Scratch scratch;  // The product with ffn.value works in it.
    int64_t* row_of;  // It holds the row of every position.

    Buffers(Memory& memory, const Rwkv4Weights& w, int64_t positions, int threads)
        : stride(round_up(w.width, kBlock)) {
        const int64_t own = std::max<int64_t>(positions, threads);
        for (float** vector : {&x, &key, &value, &receptance})
            *vector = memory.take<float>(positions * stride);
        normed = memory.take<float>(2 * threads * stride);
        for (Activations& a : mixed) a = take_activations(memory, own, stride);
        average = take_activations(memory, own, stride);
        hidden = take_activations(memory, own, round_up(w.ffn_width, kBlock));
        scratch = {memory.take<float>(kSparseRows * stride),
                   memory.take<char>(threads * (round_up(w.width, kColumns) / kColumns) * kPartial),
                   stride};
        row_of = memory.take<int64_t>(positions);
    }
};

// Memory for what a number of positions and threads needs. It is cleared whenever one of them
// changes, because the padding of vectors is read and must be zero, and other numbers divide the
// memory differently even where they need the same number of bytes.
char* reserve(Workspace& workspace, int64_t bytes, int64_t positions, int threads) {
    if (workspace.positions != positions || workspace.threads != threads) {
        workspace.memory.assign(bytes, 0);
        workspace.positions = positions;
        workspace.threads = threads;
    }
    return workspace.memory.data();
}

// One thread's view of a pass.
struct Worker {
    const Rwkv4Weights& w;
    Pass& pass;
    Buffers& b;
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
    Range tiles(const Matrix& m) const { return me.share(round_up(m.outputs, kOutputs) / kOutputs); }

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

    // Layer norm and token shift: the i-th mixture of each position with the one before it goes to
    // b.mixed[i], encoded for the matrix that it is multiplied by.
    template <int N>
    void mix(const float* weight, const float* bias, const float* before, float* after,
             const float* const (&shares)[N], const Matrix* const (&matrices)[N]) const {
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
            for (int i = 0; i < N; ++i) {
                const Activations to = own(b.mixed[i]).row(p);
                for (int64_t c = 0; c < b.stride; c += RECEPTANCE_LANES) {
                    const Float x = load<Float>(now + c), y = load<Float>(last + c);
                    store(to.values + c, y + load<Float>(shares[i] + c) * (x - y));
                }
                encode_for_tiles(to, w.width, *matrices[i]);
            }
            if (p + 1 == pass.starts[row + 1] && me.id == (alone() ? 0 : me.id))
                std::memcpy(after + row * w.width, now, w.width * sizeof(float));
            std::swap(now, last);
        }
        rows_done();
    }

    // Calls put(m, first output, vector) for this thread's outputs.
    template <class Put>
    void multiply(const Matrix& m, const Activations& a, const Put& put) const {
        product(m, tiles(m), own(a), pass.positions, put);
    }

    void time_mix(const LayerWeights& l, int64_t layer) const {
        const int64_t at = layer * pass.rows * w.width;
        mix<3>(l.ln1_weight, l.ln1_bias, pass.before.time_shift + at, pass.after.time_shift + at,
               {l.time_mix_k, l.time_mix_v, l.time_mix_r}, {&l.key, &l.value, &l.receptance});
        const auto into = [this](float* to) {
            return [this, to](int64_t m, int64_t n, Float x) { store(to + m * b.stride + n, x); };
        };
        multiply(l.key, b.mixed[0], into(b.key));
        multiply(l.value, b.mixed[1], into(b.value));
        multiply(l.receptance, b.mixed[2], into(b.receptance));
        // This thread computed key, value and receptance of these channels, so it need not wait.
        for (Range t = tiles(l.key); t.begin < t.end; ++t.begin)
            average(l, at, t.begin * kOutputs);
        me.wait();

        const Activations gated = own_codes(b.average);
        const Range mine = positions();
        for (int64_t p = mine.begin; p < mine.end; ++p)
            encode_for_tiles(gated.row(p), w.width, l.output);
        rows_done();
        product(l.output, tiles(l.output), gated, pass.positions,
                [this](int64_t m, int64_t n, Float x) {
                    float* to = b.x + m * b.stride + n;
                    store(to, load<Float>(to) + x);
                });
        me.wait();
    }

    // Runs the recurrence of ops/reference.py over kOutputs channels from `first` on, for every
    // row.
    void average(const LayerWeights& l, int64_t at, int64_t first) const {
        for (int64_t row = 0; row < pass.rows; ++row) {
            if (pass.starts[row] == pass.starts[row + 1]) continue;
            OutputVectors a, d, o;
            for (int v = 0; v < kVectors; ++v) {
                const int64_t c = first + v * RECEPTANCE_LANES, n = real(c), s = at + row * w.width;
                a[v] = load<Float>(pass.before.numerator + s + c, n);
                d[v] = load<Float>(pass.before.denominator + s + c, n);
                o[v] = load<Float>(pass.before.exponent + s + c, n);
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
                    store(b.average.values + i, sigmoid(load<Float>(b.receptance + i)) * mean);

                    const Float faded = o[v] + load<Float>(l.log_decay + c);
                    gap = faded - k;
                    small = exp_nonpositive(minus_abs(gap));
                    const Float keep = gap > 0 ? one : small, add = gap > 0 ? small : one;
                    a[v] = a[v] * keep + add * x;
                    d[v] = d[v] * keep + add;
                    o[v] = gap > 0 ? faded : k;
                }
            for (int v = 0; v < kVectors; ++v) {
                const int64_t c = first + v * RECEPTANCE_LANES, n = real(c), s = at + row * w.width;
                store(pass.after.numerator + s + c, a[v], n);
                store(pass.after.denominator + s + c, d[v], n);
                store(pass.after.exponent + s + c, o[v], n);
            }
        }
    }

    // How many lanes of a vector that begins at channel c are channels of the model.
    int64_t real(int64_t c) const {
        return std::max<int64_t>(0, std::min<int64_t>(RECEPTANCE_LANES, w.width - c));
    }

    void channel_mix(const LayerWeights& l, int64_t layer) const {
        const int64_t at = layer * pass.rows * w.width;
        mix<2>(l.ln2_weight, l.ln2_bias, pass.before.channel_shift + at,
               pass.after.channel_shift + at, {l.channel_mix_k, l.channel_mix_r},
               {&l.ffn_key, &l.ffn_receptance});
        multiply(l.ffn_key, b.mixed[0], [this](int64_t m, int64_t n, Float x) {
            const Float positive = x < 0 ? Float{} : x;  // A NaN stays NaN.
            store(b.hidden.values + m * b.hidden.stride + n, positive * positive);
        });
        multiply(l.ffn_receptance, b.mixed[1], [this](int64_t m, int64_t n, Float x) {
            store(b.receptance + m * b.stride + n, sigmoid(x));
        });
        me.wait();

        const Activations hidden = own_codes(b.hidden);
        const Range mine = positions();
        int64_t nonzero = 0;
        for (int64_t p = mine.begin; p < mine.end; ++p) {
            encode_for_rows(hidden.row(p), w.ffn_width, l.ffn_value);
            nonzero += count_nonzero(hidden.row(p).values, w.ffn_width);
        }
        if (!alone() || me.id == 0) pass.nonzero += nonzero;
        rows_done();

        sparse_product(l.ffn_value, me, hidden, pass.positions, b.value, b.stride, b.scratch);
        const Range columns = me.share(round_up(w.width, kColumns), kColumns);
        for (int64_t p = 0; p < pass.positions; ++p)
            for (int64_t c = columns.begin; c < columns.end; c += RECEPTANCE_LANES) {
                const int64_t i = p * b.stride + c;
                const Float gate = load<Float>(b.receptance + i);
                store(b.x + i, load<Float>(b.x + i) + gate * load<Float>(b.value + i));
            }
        me.wait();
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

    void run() const {
        embed();
        for (int64_t layer = 0; layer < (int64_t)w.layers.size(); ++layer) {
            time_mix(w.layers[layer], layer);
            channel_mix(w.layers[layer], layer);
        }
        finish();
    }
};

// Copies the states of rows that read no token.
void keep_states(const Rwkv4Weights& w, const Pass& pass) {
    const auto copy = [&](const float* from, float* to, int64_t row) {
        for (int64_t layer = 0; layer < (int64_t)w.layers.size(); ++layer) {
            const int64_t at = (layer * pass.rows + row) * w.width;
            std::memcpy(to + at, from + at, w.width * sizeof(float));
        }
    };
    for (int64_t row = 0; row < pass.rows; ++row) {
        if (pass.starts[row] != pass.starts[row + 1]) continue;
        copy(pass.before.time_shift, pass.after.time_shift, row);
        copy(pass.before.channel_shift, pass.after.channel_shift, row);
        copy(pass.before.numerator, pass.after.numerator, row);
        copy(pass.before.denominator, pass.after.denominator, row);
        copy(pass.before.exponent, pass.after.exponent, row);
    }
}

void features(const Rwkv4Weights& w, Pass& pass, Workspace& workspace, int threads) {
    keep_states(w, pass);
    pass.nonzero = 0;
    if (!pass.positions) return;
    Memory measure(nullptr);
    (void)Buffers(measure, w, pass.positions, threads);
    Memory memory(reserve(workspace, measure.used() + 64, pass.positions, threads));
    Buffers buffers(memory, w, pass.positions, threads);
    for (int64_t row = 0; row < pass.rows; ++row)
        for (int64_t p = pass.starts[row]; p < pass.starts[row + 1]; ++p) buffers.row_of[p] = row;
    run_team(threads, [&](Member me) { Worker{w, pass, buffers, me}.run(); });
}

void head(const Rwkv4Weights& w, const float* features, int64_t count, float* logits,
          Workspace& workspace, int threads) {
    const int64_t stride = round_up(w.width, kBlock);
    Memory measure(nullptr);
    (void)take_activations(measure, count, stride);
    Memory memory(reserve(workspace, measure.used() + 64, count, 1));
    const Activations a = take_activations(memory, count, stride);
    run_team(threads, [&](Member me) {
        const Range mine = me.share(count);
        for (int64_t m = mine.begin; m < mine.end; ++m) {
            const Activations row = a.row(m);
            std::memset(row.values, 0, stride * sizeof(float));
            std::memcpy(row.values, features + m * w.width, w.width * sizeof(float));
            encode_for_tiles(row, w.width, w.head);
        }
        me.wait();
        const int64_t vocab = w.vocab_size;
        product(w.head, me.share(round_up(vocab, kOutputs) / kOutputs), a, count,
                [&](int64_t m, int64_t n, Float x) {
                    const int64_t left = std::min<int64_t>(RECEPTANCE_LANES, vocab - n);
                    if (left > 0) store(logits + m * vocab + n, x, left);
                });
    });
}

uint32_t read(const char* data, int64_t bytes, int threads) {
    constexpr int kStep = 8 * sizeof(Word);
    std::atomic<uint32_t> total{0};
    run_team(threads, [&](Member me) {
        const Range mine = me.share(bytes / kStep);
        Word sums[8] = {};
        for (int64_t i = mine.begin; i < mine.end; ++i) {
            const char* from = data + i * kStep;
            for (int line = 0; line < kStep; line += 64) __builtin_prefetch(from + line + 4096);
            for (int j = 0; j < 8; ++j) {
                Word word;
                std::memcpy(&word, from + j * sizeof word, sizeof word);
                sums[j] += word;
            }
        }
        for (const Word& sum : sums) total += sum[0];
    });
    return total;
}

}  // namespace

extern const Rwkv4Kernels RECEPTANCE_TABLE(rwkv4_) = {RECEPTANCE_KERNELS_NAME, features, head,
                                                         read};

}  // namespace receptance
