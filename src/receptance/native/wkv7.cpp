// The WKV-7 kernels, forward and backward, written once in GCC/Clang vector extensions and compiled
// once per instruction set (see CMakeLists.txt: RECEPTANCE_LANES, RECEPTANCE_KERNELS).
//
// A task is one head of one row of the batch; it walks through time token by token, with the state
// in the first-level cache. The backward pass recomputes the states of a chunk from the one at its
// start, and then walks back through the chunk. A decay as small as 0 is allowed, so states are not
// found by undoing a step. No sum is over heads or rows, so that the number of threads changes no
// bit of a result.

#include "wkv7.h"

#include <cstring>
#include <type_traits>

#include "delta.h"
#include "heads.h"
#include "kernels.h"

namespace receptance {
namespace {

// The number of vectors of columns whose gradients are summed side by side: as many as there are
// registers for.
constexpr int kColumnVectors = RECEPTANCE_LANES == 16 ? 2 : 1;

// ---- tokens -------------------------------------------------------------------------------------

// A token's vectors in float or double, padded with zeros.
template <class S>
struct TokenRoom {
    S *receptance, *fade, *base, *key, *value, *removal, *replacement;

    TokenRoom() = default;
    TokenRoom(Memory& memory, int64_t side) {
        for (S** x : {&receptance, &fade, &base, &key, &value, &removal, &replacement})
            *x = memory.take<S>(side);
    }
    template <class T, class V, class F>
    Token<S> read(const Head<F>& head, int64_t t) const {
        head.template load_vector<V, T>(head.f.receptance, t, receptance);
        head.template load_vector<V, S>(head.f.log_decay, t, fade);
        const bool strong = split_decay<V>(head.side, fade, base);
        head.template load_vector<V, T>(head.f.key, t, key);
        head.template load_vector<V, T>(head.f.value, t, value);
        head.template load_vector<V, T>(head.f.removal, t, removal);
        head.template load_vector<V, T>(head.f.replacement, t, replacement);
        return {receptance, fade, strong ? base : nullptr, key, value, removal, replacement};
    }
};

// ---- forward ------------------------------------------------------------------------------------

template <class S>
struct ForwardRoom {
    S *state, *removed, *out;
    TokenRoom<S> token;

    ForwardRoom(Memory& memory, int64_t side) {
        state = memory.take<S>(side * side);
        removed = memory.take<S>(side);
        out = memory.take<S>(side);
        token = TokenRoom<S>(memory, side);
    }
};

template <class T, class V, class S>
void forward_head(const Head<Wkv7Forward>& head, const ForwardRoom<S>& room) {
    const Wkv7Forward& f = head.f;
    const int64_t side = head.side, tokens = head.tokens();
    head.load_state(f.state, head.state(), room.state);
    for (int64_t t = 0; t < f.time; ++t) {
        if (t % kWkv7Chunk == 0)
            head.store_state(room.state, f.starts, head.start(t / kWkv7Chunk));
        if (t >= tokens) {
            head.template clear_vector<T>(f.out, t);
            continue;
        }
        if (head.reset(t)) std::memset(room.state, 0, side * side * sizeof(S));
        const Token<S> x = room.token.template read<T, V>(head, t);
        advance<V, true>(room.state, room.state, side, x, room.removed, room.out);
        head.template store_vector<V, T>(room.out, f.out, t);
    }
    head.store_state(room.state, f.state_out, head.state());
}

// ---- backward -----------------------------------------------------------------------------------

template <class S>
struct BackwardRoom {
    S* grad_state;  // the gradient of the state after the token
    S* states;      // [kWkv7Chunk + 1][side][side]: before each token, after a reset
    S *removed[kWkv7Chunk], *grad_out, *grad_removed;
    TokenRoom<S> tokens[kWkv7Chunk], grads;

    BackwardRoom(Memory& memory, int64_t side) {
        grad_state = memory.take<S>(side * side);
        states = memory.take<S>((kWkv7Chunk + 1) * side * side);
        grad_out = memory.take<S>(side);
        grad_removed = memory.take<S>(side);
        for (S*& x : removed) x = memory.take<S>(side);
        for (TokenRoom<S>& x : tokens) x = TokenRoom<S>(memory, side);
        grads = TokenRoom<S>(memory, side);
    }
};

template <class V, class S>
S dot(const S* a, const S* b, int64_t side) {
    V sum{};
    for (int64_t c = 0; c < side; c += RECEPTANCE_LANES)
        sum = add_product(sum, load<V>(a + c), load<V>(b + c));
    S total = 0;
    for (int i = 0; i < RECEPTANCE_LANES; ++i) total += sum[i];
    return total;
}

// Adds what y contributes to the gradient of the state after the token, and multiplies that by the
// two vectors of the key axis: the gradients of the value and of what was removed.
template <class V, int kBlocks, class S>
void gradients_of_rows(const BackwardRoom<S>& room, int64_t side, const Token<S>& x) {
    const ColumnAxis<V, kBlocks, S> receptance(x.receptance), key(x.key), replacement(x.replacement);
    PanelSums<V> by_key, by_replacement;
    PanelVectors<V> total;
    for (int64_t first = 0; first < side; first += kPanel) {
        for (int64_t row = 0; row < kPanel; ++row) {
            S* const grad_state = room.grad_state + (first + row) * side;
            const V grad_out = broadcast(room.grad_out[first + row]);
            PanelVectors<V> sum{}, other{};
            for_columns<kBlocks>(side, RECEPTANCE_COLUMN {
                const V g = add_product(load<V>(grad_state + c), grad_out, receptance[i]);
                store(grad_state + c, g);
                sum[v] = add_product(sum[v], g, key[i]);
                other[v] = add_product(other[v], g, replacement[i]);
            });
            for (int64_t v = 0; v < kPanelVectors; ++v)
                by_key[row][v] = sum[v], by_replacement[row][v] = other[v];
        }
        add_lanes<V>(by_key, total);
        for (int64_t v = 0; v < kPanelVectors; ++v)
            store(room.grads.value + first + v * RECEPTANCE_LANES, total[v]);
        add_lanes<V>(by_replacement, total);
        for (int64_t v = 0; v < kPanelVectors; ++v)
            store(room.grad_removed + first + v * RECEPTANCE_LANES, total[v]);
    }
}

// Sums over the rows, for kWide vectors of columns from `first` on: the gradients of the vectors of
// the key axis. Carries the gradient of the state to the token before.
template <class V, int kWide, bool kBase, class S>
void gradients_of_columns(const BackwardRoom<S>& room, int64_t side, const Token<S>& x,
                          const S* state, const S* removed, S along_removed, S along_value,
                          int64_t first) {
    // Copies, because a store of floats could change pointers that lie in memory.
    const S *const grad_out = room.grad_out, *const grad_removed = room.grad_removed;
    const S* const values = x.value;
    S* const grad_state = room.grad_state;
    V out[kWide] = {}, key[kWide] = {}, decay[kWide] = {}, put_back[kWide] = {}, removal[kWide] = {};
    V fade[kWide], base[kWide], back[kWide];
    for (int j = 0; j < kWide; ++j) {
        fade[j] = load<V>(x.fade + first + j * RECEPTANCE_LANES);
        base[j] = kBase ? load<V>(x.base + first + j * RECEPTANCE_LANES) : V{};
        back[j] = load<V>(x.removal + first + j * RECEPTANCE_LANES);
    }
    for (int64_t i = 0; i < side; ++i) {
        const V grad = broadcast(grad_out[i]), value = broadcast(values[i]);
        const V taken = broadcast(removed[i]), grad_taken = broadcast(grad_removed[i]);
        for (int j = 0; j < kWide; ++j) {
            const int64_t at = i * side + first + j * RECEPTANCE_LANES;
            const V s = load<V>(state + at), g = load<V>(grad_state + at);
            out[j] = add_product(out[j], s, grad);
            key[j] = add_product(key[j], g, value);
            decay[j] = add_product(decay[j], g, s);
            put_back[j] = add_product(put_back[j], g, taken);
            removal[j] = add_product(removal[j], s, grad_taken);
            store(grad_state + at, add_product(faded<kBase>(g, j, base, fade), grad_taken, back[j]));
        }
    }
    for (int j = 0; j < kWide; ++j) {
        const int64_t c = first + j * RECEPTANCE_LANES;
        // The state after the token is not at hand, but what it is made of: its product with the
        // gradient of y is that of its three parts.
        V r = faded<kBase>(out[j], j, base, fade);
        r = add_product(r, load<V>(x.replacement + c), broadcast(along_removed));
        r = add_product(r, load<V>(x.key + c), broadcast(along_value));
        store(room.grads.receptance + c, r);
        store(room.grads.key + c, key[j]);
        store(room.grads.fade + c, faded<kBase>(decay[j], j, base, fade));  // of log_decay
        store(room.grads.replacement + c, put_back[j]);
        store(room.grads.removal + c, removal[j]);
    }
}

template <class T, class V, class S>
void backward_token(const Head<Wkv7Backward>& head, const BackwardRoom<S>& room, int64_t t,
                    const Token<S>& x, const S* state, const S* removed) {
    const Wkv7Backward& f = head.f;
    const int64_t side = head.side;
    head.template load_vector<V, T>(f.grad_out, t, room.grad_out, -kAhead);
    if (side == 64) gradients_of_rows<V, 4>(room, side, x);
    else gradients_of_rows<V, 0>(room, side, x);
    const S along_removed = dot<V>(removed, room.grad_out, side);
    const S along_value = dot<V>(x.value, room.grad_out, side);
    const auto columns = [&](auto wide, auto base, int64_t c) {
        gradients_of_columns<V, wide(), base()>(room, side, x, state, removed, along_removed,
                                                along_value, c);
    };
    using One = std::integral_constant<int, 1>;
    using Wide = std::integral_constant<int, kColumnVectors>;
    int64_t c = 0;
    for (; !x.base && c + Wide() * RECEPTANCE_LANES <= side; c += Wide() * RECEPTANCE_LANES)
        columns(Wide(), std::false_type(), c);
    for (; !x.base && c < side; c += RECEPTANCE_LANES) columns(One(), std::false_type(), c);
    for (; c < side; c += RECEPTANCE_LANES) columns(One(), std::true_type(), c);
    head.template store_vector<V, T>(room.grads.receptance, f.grad_receptance, t, -kAhead);
    head.template store_vector<V, S>(room.grads.fade, f.grad_log_decay, t, -kAhead);
    head.template store_vector<V, T>(room.grads.key, f.grad_key, t, -kAhead);
    head.template store_vector<V, T>(room.grads.value, f.grad_value, t, -kAhead);
    head.template store_vector<V, T>(room.grads.removal, f.grad_removal, t, -kAhead);
    head.template store_vector<V, T>(room.grads.replacement, f.grad_replacement, t, -kAhead);
}

template <class T, class V, class S>
void backward_head(const Head<Wkv7Backward>& head, const BackwardRoom<S>& room) {
    const Wkv7Backward& f = head.f;
    const int64_t side = head.side, tokens = head.tokens(), square = side * side;
    for (int64_t t = tokens; t < f.time; ++t) {
        for (void* to : {f.grad_receptance, f.grad_key, f.grad_value, f.grad_removal,
                         f.grad_replacement})
            head.template clear_vector<T>(to, t);
        head.template clear_vector<S>(f.grad_log_decay, t);
    }
    head.load_state(f.grad_state, head.state(), room.grad_state);
    for (int64_t chunk = (tokens + kWkv7Chunk - 1) / kWkv7Chunk - 1; chunk >= 0; --chunk) {
        const int64_t from = chunk * kWkv7Chunk, count = std::min(kWkv7Chunk, tokens - from);
        Token<S> x[kWkv7Chunk];
        head.load_state(f.starts, head.start(chunk), room.states);
        for (int64_t i = 0; i < count; ++i) {
            S* const state = room.states + i * square;
            if (head.reset(from + i)) std::memset(state, 0, square * sizeof(S));
            x[i] = room.tokens[i].template read<T, V>(head, from + i);
            advance<V, false, S>(state, state + square, side, x[i], room.removed[i], nullptr);
        }
        for (int64_t i = count - 1; i >= 0; --i) {
            backward_token<T, V>(head, room, from + i, x[i], room.states + i * square,
                                 room.removed[i]);
            if (head.reset(from + i)) std::memset(room.grad_state, 0, square * sizeof(S));
        }
    }
    head.store_state(room.grad_state, f.grad_state_in, head.state());
}

// ---- the table ----------------------------------------------------------------------------------

void forward(const Wkv7Forward& f, Element element, int threads) {
    const auto run = [&](auto number, auto vector) {
        using T = decltype(number);
        using V = decltype(vector);
        using S = typename Scalar<V>::type;
        for_each_head<ForwardRoom<S>>(f, threads, [](const auto& head, const auto& room) {
            forward_head<T, V>(head, room);
        });
    };
    if (element == Element::float64) run(double{}, Double{});
    else if (element == Element::bfloat16) run(bfloat16{}, Float{});
    else run(float{}, Float{});
}

void backward(const Wkv7Backward& f, Element element, int threads) {
    const auto run = [&](auto number, auto vector) {
        using T = decltype(number);
        using V = decltype(vector);
        using S = typename Scalar<V>::type;
        for_each_head<BackwardRoom<S>>(f, threads, [](const auto& head, const auto& room) {
            backward_head<T, V>(head, room);
        });
    };
    if (element == Element::float64) run(double{}, Double{});
    else if (element == Element::bfloat16) run(bfloat16{}, Float{});
    else run(float{}, Float{});
}

}  // namespace

extern const Wkv7Kernels RECEPTANCE_TABLE(wkv7_) = {forward, backward};

}  // namespace receptance
