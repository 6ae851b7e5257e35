// The WKV-4 kernels, forward and backward, written once in GCC/Clang vector extensions and compiled
// once per instruction set (see CMakeLists.txt: RECEPTANCE_LANES, RECEPTANCE_KERNELS).
//
// A task is one row of the batch and a tile of channels; it walks through time token by token with
// the state in the first-level cache. One of the two factors of every rescaling is 1, so that a
// rescaling takes one exponential and a select. Everything but the table of kernels is in an
// anonymous namespace, so that code compiled for one instruction set is never linked into another.

#include "wkv4.h"

#include <cstring>

#include "kernels.h"
#include "parallel.h"
#include "vector.h"

namespace receptance {
namespace {

// The number of channels of one task: its scratch memory fits into the second-level cache.
constexpr int64_t kTile = 128;
// Software prefetches so many tokens ahead, because the hardware does not recognize a tile, whose
// tokens lie a whole width apart, as a stream.
constexpr int64_t kAhead = 4;

// ---- tiles --------------------------------------------------------------------------------------

// Channels [first, first + count) of row b; `count` is at most kTile.
struct ChannelTile {
    int64_t b, first, count;
};

template <class Work>
void for_each_tile(int64_t batch, int64_t width, int threads, const Work& work) {
    const int64_t tiles = (width + kTile - 1) / kTile;
    parallel_for(batch * tiles, threads, [&](int64_t task) {
        const int64_t first = task % tiles * kTile;
        const int64_t left = width - first;
        work(ChannelTile{task / tiles, first, left < kTile ? left : kTile});
    });
}

// for_each_vector calls step(c, n) for every vector of n channels that starts at c. Steps are
// always inlined, because every load and store is one instruction where the compiler knows n.
#define RECEPTANCE_STEP [&](int64_t c, int64_t n) __attribute__((always_inline))

template <class Step>
inline void for_each_vector(int64_t count, const Step& step) {
    int64_t c = 0;
    for (; c + RECEPTANCE_LANES <= count; c += RECEPTANCE_LANES) step(c, (int64_t)RECEPTANCE_LANES);
    if (c < count) step(c, count - c);
}

template <class S>
struct alignas(64) TileState {
    S numerator[kTile], denominator[kTile], exponent[kTile];
    // `lost` is what rounding took from the exponent. A slow decay is added thousands of times
    // before a larger key replaces the exponent; without this term the error would grow with T.
    S lost[kTile];

    void load_from(const S* a, const S* b, const S* o, int64_t count) {
        std::memcpy(numerator, a, count * sizeof(S));
        std::memcpy(denominator, b, count * sizeof(S));
        std::memcpy(exponent, o, count * sizeof(S));
        std::memset(lost, 0, sizeof lost);
    }
    void store_to(S* a, S* b, S* o, int64_t count) const {
        std::memcpy(a, numerator, count * sizeof(S));
        std::memcpy(b, denominator, count * sizeof(S));
        for (int64_t c = 0; c < count; ++c) o[c] = exponent[c] + lost[c];
    }
    void forget(int64_t count) {
        for (int64_t c = 0; c < count; ++c) {
            numerator[c] = denominator[c] = lost[c] = 0;
            exponent[c] = kEmptyExponent;
        }
    }
};

// ---- forward ------------------------------------------------------------------------------------

template <class T, class V>
void forward_tile(const Forward& f, ChannelTile tile) {
    using S = typename Scalar<V>::type;
    const int64_t width = f.width, chunks = (f.time + kChunk - 1) / kChunk;
    const int64_t row = tile.b * width + tile.first;
    const int64_t tokens = f.lengths ? f.lengths[tile.b] : f.time;
    const bool* resets = f.resets ? f.resets + tile.b * f.time : nullptr;
    const T* key = (const T*)f.key + tile.b * f.time * width + tile.first;
    const T* value = (const T*)f.value + tile.b * f.time * width + tile.first;
    T* out = (T*)f.out + tile.b * f.time * width + tile.first;
    S* starts = (S*)f.starts + tile.b * chunks * 3 * width + tile.first;
    const S* log_decay = (const S*)f.log_decay + tile.first;
    const S* bonus = (const S*)f.bonus + tile.first;

    TileState<S> state;
    state.load_from((const S*)f.numerator + row, (const S*)f.denominator + row,
                    (const S*)f.exponent + row, tile.count);
    for (int64_t t = 0; t < f.time; ++t, key += width, value += width, out += width) {
        if (t % kChunk == 0) {
            state.store_to(starts, starts + width, starts + 2 * width, tile.count);
            starts += 3 * width;
        }
        if (t >= tokens) {
            std::memset(out, 0, tile.count * sizeof(T));
            continue;
        }
        if (resets && resets[t]) state.forget(tile.count);
        const int64_t ahead = t + kAhead < tokens ? kAhead * width : 0;
        for_each_vector(tile.count, RECEPTANCE_STEP {
            __builtin_prefetch(key + c + ahead);
            __builtin_prefetch(value + c + ahead);
            __builtin_prefetch(out + c + ahead, 1);
            const V k = load<V>(key + c, n), v = load<V>(value + c, n);
            V a = load<V>(state.numerator + c), b = load<V>(state.denominator + c);
            const V o = load<V>(state.exponent + c);
            V lost = load<V>(state.lost + c);

            const V now = load<V>(bonus + c, n) + k;
            V gap = o - now + lost;
            V small = exp_nonpositive(minus_abs(gap));
            const V past = gap > 0 ? V{} + 1 : small, present = gap > 0 ? small : V{} + 1;
            store(out + c, (a * past + present * v) / (b * past + present), n);

            const V w = load<V>(log_decay + c, n), faded = o + w;
            lost += o - faded + w;
            gap = faded - k + lost;
            small = exp_nonpositive(minus_abs(gap));
            const V keep = gap > 0 ? V{} + 1 : small, add = gap > 0 ? small : V{} + 1;
            a = a * keep + add * v;
            b = b * keep + add;
            store(state.numerator + c, a);
            store(state.denominator + c, b);
            store(state.exponent + c, gap > 0 ? faded : k);
            store(state.lost + c, gap > 0 ? lost : V{});
        });
    }
    state.store_to((S*)f.numerator_out + row, (S*)f.denominator_out + row, (S*)f.exponent_out + row,
                   tile.count);
}

// ---- backward -----------------------------------------------------------------------------------

// The values that the forward pass had at each position of one chunk.
template <class S>
struct alignas(64) Replay {
    TileState<S> before[kChunk];
    S keep[kChunk][kTile], add[kChunk][kTile];  // the two factors of the state's update
};

// Recomputes the states and factors of a chunk's tokens from the state at its start.
template <class T, class V, class S>
void replay(const Backward& f, ChannelTile tile, int64_t from, int64_t to, const S* log_decay,
            TileState<S>& state, Replay<S>& kept) {
    const int64_t offset = (tile.b * f.time + from) * f.width + tile.first;
    const T *key = (const T*)f.key + offset, *value = (const T*)f.value + offset;
    const T* grad_out = (const T*)f.grad_out + offset;
    const bool* resets = f.resets ? f.resets + tile.b * f.time : nullptr;
    for (int64_t t = from; t < to; ++t, key += f.width, value += f.width, grad_out += f.width) {
        if (resets && resets[t]) state.forget(tile.count);
        TileState<S>& before = kept.before[t - from];
        S *keep_t = kept.keep[t - from], *add_t = kept.add[t - from];
        const int64_t ahead = t + kAhead < to ? kAhead * f.width : 0;
        for_each_vector(tile.count, RECEPTANCE_STEP {
            __builtin_prefetch(key + c + ahead);
            __builtin_prefetch(value + c + ahead);
            __builtin_prefetch(grad_out + c);  // The loop back through the chunk reads it.
            const V k = load<V>(key + c, n), v = load<V>(value + c, n);
            const V a = load<V>(state.numerator + c), b = load<V>(state.denominator + c);
            const V o = load<V>(state.exponent + c), w = load<V>(log_decay + c, n);
            V lost = load<V>(state.lost + c);
            store(before.numerator + c, a);
            store(before.denominator + c, b);
            store(before.exponent + c, o + lost);

            const V faded = o + w;
            lost += o - faded + w;
            const V gap = faded - k + lost;
            const V small = exp_nonpositive(minus_abs(gap));
            const V keep = gap > 0 ? V{} + 1 : small, add = gap > 0 ? small : V{} + 1;
            store(keep_t + c, keep);
            store(add_t + c, add);
            store(state.numerator + c, a * keep + add * v);
            store(state.denominator + c, b * keep + add);
            store(state.exponent + c, gap > 0 ? faded : k);
            store(state.lost + c, gap > 0 ? lost : V{});
        });
    }
}

template <class T, class V>
void backward_tile(const Backward& f, ChannelTile tile) {
    using S = typename Scalar<V>::type;
    const int64_t width = f.width, chunks = (f.time + kChunk - 1) / kChunk;
    const int64_t row = tile.b * width + tile.first;
    const int64_t begin = tile.b * f.time * width + tile.first;
    const int64_t tokens = f.lengths ? f.lengths[tile.b] : f.time;
    const S* log_decay = (const S*)f.log_decay + tile.first;
    const S* bonus = (const S*)f.bonus + tile.first;
    const S* starts = (const S*)f.starts + tile.b * chunks * 3 * width + tile.first;

    for (int64_t t = tokens; t < f.time; ++t) {
        std::memset((T*)f.grad_key + begin + t * width, 0, tile.count * sizeof(T));
        std::memset((T*)f.grad_value + begin + t * width, 0, tile.count * sizeof(T));
    }

    // grad_a and grad_b are the gradients of numerator and denominator after token t, in the scale
    // of the exponent there. The backward pass multiplies them by factors of the forward pass,
    // which are all at most 1.
    alignas(64) S grad_a[kTile], grad_b[kTile], chunk_decay[kTile], chunk_bonus[kTile];
    double sum_decay[kTile] = {}, sum_bonus[kTile] = {};
    std::memcpy(grad_a, (const S*)f.grad_numerator + row, tile.count * sizeof(S));
    std::memcpy(grad_b, (const S*)f.grad_denominator + row, tile.count * sizeof(S));

    TileState<S> state{};
    Replay<S> kept;
    for (int64_t chunk = (tokens + kChunk - 1) / kChunk - 1; chunk >= 0; --chunk) {
        const int64_t from = chunk * kChunk;
        const int64_t to = from + kChunk < tokens ? from + kChunk : tokens;
        const S* start = starts + chunk * 3 * width;
        state.load_from(start, start + width, start + 2 * width, tile.count);
        replay<T, V, S>(f, tile, from, to, log_decay, state, kept);
        std::memset(chunk_decay, 0, sizeof chunk_decay);
        std::memset(chunk_bonus, 0, sizeof chunk_bonus);

        for (int64_t t = to - 1; t >= from; --t) {
            const int64_t offset = begin + t * width;
            const T *key = (const T*)f.key + offset, *value = (const T*)f.value + offset;
            const T* grad_out = (const T*)f.grad_out + offset;
            T *grad_key = (T*)f.grad_key + offset, *grad_value = (T*)f.grad_value + offset;
            const TileState<S>& before = kept.before[t - from];
            const S *keep_t = kept.keep[t - from], *add_t = kept.add[t - from];
            const int64_t ahead = t - kAhead >= from ? kAhead * width : 0;
            for_each_vector(tile.count, RECEPTANCE_STEP {
                __builtin_prefetch(grad_key + c - ahead, 1);
                __builtin_prefetch(grad_value + c - ahead, 1);
                const V k = load<V>(key + c, n), v = load<V>(value + c, n);
                const V a = load<V>(before.numerator + c), b = load<V>(before.denominator + c);
                const V ga = load<V>(grad_a + c), gb = load<V>(grad_b + c);

                // Recompute y, and what the token's own weight contributes to it.
                const V gap = load<V>(before.exponent + c) - (load<V>(bonus + c, n) + k);
                const V small = exp_nonpositive(minus_abs(gap));
                const V past = gap > 0 ? V{} + 1 : small, present = gap > 0 ? small : V{} + 1;
                const V inverse = 1 / (b * past + present);
                const V y = (a * past + present * v) * inverse;
                const V q = load<V>(grad_out + c, n) * inverse;
                const V own_value = q * present, own_key = own_value * (v - y);

                // Add what later tokens contribute through the state.
                const V keep = load<V>(keep_t + c), add = load<V>(add_t + c);
                store(grad_value + c, own_value + add * ga, n);
                store(grad_key + c, own_key + add * (ga * v + gb), n);
                store(chunk_decay + c, load<V>(chunk_decay + c) + keep * (ga * a + gb * b));
                store(chunk_bonus + c, load<V>(chunk_bonus + c) + own_key);

                // Carry the gradients to the token before.
                store(grad_a + c, keep * ga + past * q);
                store(grad_b + c, keep * gb - past * (q * y));
            });
        }
        for (int64_t c = 0; c < tile.count; ++c) {
            sum_decay[c] += chunk_decay[c];
            sum_bonus[c] += chunk_bonus[c];
        }
    }
    std::memcpy(f.grad_log_decay + row, sum_decay, tile.count * sizeof(double));
    std::memcpy(f.grad_bonus + row, sum_bonus, tile.count * sizeof(double));
    std::memcpy((S*)f.grad_numerator_in + row, grad_a, tile.count * sizeof(S));
    std::memcpy((S*)f.grad_denominator_in + row, grad_b, tile.count * sizeof(S));
}

// ---- the table ----------------------------------------------------------------------------------

void forward(const Forward& f, Element element, int threads) {
    for_each_tile(f.batch, f.width, threads, [&](ChannelTile tile) {
        if (element == Element::float64) forward_tile<double, Double>(f, tile);
        else if (element == Element::bfloat16) forward_tile<bfloat16, Float>(f, tile);
        else forward_tile<float, Float>(f, tile);
    });
}

void backward(const Backward& f, Element element, int threads) {
    for_each_tile(f.batch, f.width, threads, [&](ChannelTile tile) {
        if (element == Element::float64) backward_tile<double, Double>(f, tile);
        else if (element == Element::bfloat16) backward_tile<bfloat16, Float>(f, tile);
        else backward_tile<float, Float>(f, tile);
    });
}

}  // namespace

extern const Wkv4Kernels RECEPTANCE_TABLE(wkv4_) = {forward, backward};

}  // namespace receptance
