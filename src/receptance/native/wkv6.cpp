// The WKV-6 kernels, forward and backward, written once in GCC/Clang vector extensions and compiled
// once per instruction set (see CMakeLists.txt: RECEPTANCE_LANES, RECEPTANCE_KERNELS).
//
// A task is one head of one row of the batch; it walks through time token by token, with the state
// in the first-level cache. The backward pass recomputes the states of a chunk from the one at its
// start, and then walks back through the chunk. A decay as small as 0 is allowed, so states are not
// found by undoing a step.

#include "wkv6.h"

#include <cstring>

#include "fading.h"
#include "heads.h"
#include "kernels.h"

namespace receptance {
namespace {

// ---- tokens -------------------------------------------------------------------------------------

// A token's vectors in float or double, padded with zeros.
template <class S>
struct TokenRoom {
    S *receptance, *fade, *base, *key, *value;

    TokenRoom() = default;
    TokenRoom(Memory& memory, int64_t side) {
        for (S** x : {&receptance, &fade, &base, &key, &value}) *x = memory.take<S>(side);
    }
    template <class T, class V, class F>
    FadingToken<S> read(const Head<F>& head, int64_t t) const {
        head.template load_vector<V, T>(head.f.receptance, t, receptance);
        head.template load_vector<V, S>(head.f.log_decay, t, fade);
        const bool strong = split_decay<V>(head.side, fade, base);
        head.template load_vector<V, T>(head.f.key, t, key);
        head.template load_vector<V, T>(head.f.value, t, value);
        return {receptance, fade, strong ? base : nullptr, key, value};
    }
};

// Copies a head's bonus, padded with zeros.
template <class S, class F>
void load_bonus(const Head<F>& head, S* to) {
    std::memset(to, 0, head.side * sizeof(S));
    std::memcpy(to, (const S*)head.f.bonus + head.h * head.f.size, head.f.size * sizeof(S));
}

template <class V, class S>
S dot(const S* a, const S* b, int64_t side) {
    V sum{};
    for (int64_t c = 0; c < side; c += RECEPTANCE_LANES)
        sum = add_product(sum, load<V>(a + c), load<V>(b + c));
    S total = 0;
    for (int i = 0; i < RECEPTANCE_LANES; ++i) total += sum[i];
    return total;
}

// r . (u k): how much of its own value a token reads.
template <class V, class S>
S own_share(const FadingToken<S>& x, const S* bonus, int64_t side) {
    V sum{};
    for (int64_t c = 0; c < side; c += RECEPTANCE_LANES)
        sum = add_product(sum, load<V>(x.receptance + c) * load<V>(bonus + c), load<V>(x.key + c));
    S total = 0;
    for (int i = 0; i < RECEPTANCE_LANES; ++i) total += sum[i];
    return total;
}

// ---- forward ------------------------------------------------------------------------------------

template <class S>
struct ForwardRoom {
    S *state, *bonus, *out;
    TokenRoom<S> token;

    ForwardRoom(Memory& memory, int64_t side) {
        state = memory.take<S>(side * side);
        bonus = memory.take<S>(side);
        out = memory.take<S>(side);
        token = TokenRoom<S>(memory, side);
    }
};

template <class T, class V, class S>
void forward_head(const Head<Wkv6Forward>& head, const ForwardRoom<S>& room) {
    const Wkv6Forward& f = head.f;
    const int64_t side = head.side, tokens = head.tokens();
    head.load_state(f.state, head.state(), room.state);
    load_bonus(head, room.bonus);
    for (int64_t t = 0; t < f.time; ++t) {
        if (t % kWkv6Chunk == 0)
            head.store_state(room.state, f.starts, head.start(t / kWkv6Chunk));
        if (t >= tokens) {
            head.template clear_vector<T>(f.out, t);
            continue;
        }
        if (head.reset(t)) std::memset(room.state, 0, side * side * sizeof(S));
        const FadingToken<S> x = room.token.template read<T, V>(head, t);
        const S own = own_share<V>(x, room.bonus, side);
        fade_and_add<V, true>(room.state, room.state, side, x, own, room.out);
        head.template store_vector<V, T>(room.out, f.out, t);
    }
    head.store_state(room.state, f.state_out, head.state());
}

// ---- backward -----------------------------------------------------------------------------------

template <class S>
struct BackwardRoom {
    S* grad_state;  // the gradient of the state after the token
    S* states;      // [kWkv6Chunk + 1][side][side]: before each token, after a reset
    S *grad_out, *bonus;
    double* grad_bonus;
    TokenRoom<S> tokens[kWkv6Chunk], grads;

    BackwardRoom(Memory& memory, int64_t side) {
        grad_state = memory.take<S>(side * side);
        states = memory.take<S>((kWkv6Chunk + 1) * side * side);
        grad_out = memory.take<S>(side);
        bonus = memory.take<S>(side);
        grad_bonus = memory.take<double>(side);
        for (TokenRoom<S>& x : tokens) x = TokenRoom<S>(memory, side);
        grads = TokenRoom<S>(memory, side);
    }
};

// Sums over the columns of the state before the token and of the gradient of that after it: what
// goes to the gradients of receptance, key and decay of every row.
template <class V, int kBlocks, class S>
void gradients_of_rows(const BackwardRoom<S>& room, int64_t side, const FadingToken<S>& x,
                       const S* state) {
    const ColumnAxis<V, kBlocks, S> grad_out(room.grad_out), value(x.value);
    PanelSums<V> receptance, key, decay;
    PanelVectors<V> total;
    const auto add_up = [&](const PanelSums<V>& sums, S* to) {
        add_lanes<V>(sums, total);
        for (int64_t v = 0; v < kPanelVectors; ++v) store(to + v * RECEPTANCE_LANES, total[v]);
    };
    for (int64_t first = 0; first < side; first += kPanel) {
        for (int64_t row = 0; row < kPanel; ++row) {
            const S* const s = state + (first + row) * side;
            const S* const g = room.grad_state + (first + row) * side;
            PanelVectors<V> r{}, k{}, w{};
            for_columns<kBlocks>(side, RECEPTANCE_COLUMN {
                const V before = load<V>(s + c), after = load<V>(g + c);
                r[v] = add_product(r[v], before, grad_out[i]);
                k[v] = add_product(k[v], after, value[i]);
                w[v] = add_product(w[v], after, before);
            });
            for (int64_t v = 0; v < kPanelVectors; ++v)
                receptance[row][v] = r[v], key[row][v] = k[v], decay[row][v] = w[v];
        }
        add_up(receptance, room.grads.receptance + first);
        add_up(key, room.grads.key + first);
        add_up(decay, room.grads.fade + first);
    }
}

// Sums over the rows, for kWide vectors of columns from `first` on: the gradient of the value.
// Carries the gradient of the state to the token before.
template <class V, int kWide, class S>
void gradients_of_columns(const BackwardRoom<S>& room, int64_t side, const FadingToken<S>& x, S own,
                          int64_t first) {
    const S *const receptance = x.receptance, *const key = x.key, *const fade = x.fade;
    const S* const base = x.base;
    S* const grad_state = room.grad_state;
    V grad_out[kWide], value[kWide];
    for (int j = 0; j < kWide; ++j) {
        grad_out[j] = load<V>(room.grad_out + first + j * RECEPTANCE_LANES);
        value[j] = grad_out[j] * broadcast(own);
    }
    for (int64_t row = 0; row < side; ++row) {
        const V r = broadcast(receptance[row]), k = broadcast(key[row]);
        const V faded = broadcast(fade[row]), kept = broadcast(base ? base[row] : S(1));
        for (int j = 0; j < kWide; ++j) {
            const int64_t at = row * side + first + j * RECEPTANCE_LANES;
            const V g = load<V>(grad_state + at);
            value[j] = add_product(value[j], g, k);
            store(grad_state + at, add_product(add_product(g * kept, g, faded), grad_out[j], r));
        }
    }
    for (int j = 0; j < kWide; ++j) store(room.grads.value + first + j * RECEPTANCE_LANES, value[j]);
}

template <class T, class V, class S>
void backward_token(const Head<Wkv6Backward>& head, const BackwardRoom<S>& room, int64_t t,
                    const FadingToken<S>& x, const S* state) {
    const Wkv6Backward& f = head.f;
    const int64_t side = head.side;
    head.template load_vector<V, T>(f.grad_out, t, room.grad_out, -kAhead);
    if (side == 64) gradients_of_rows<V, 4>(room, side, x, state);
    else gradients_of_rows<V, 0>(room, side, x, state);
    const S along = dot<V>(x.value, room.grad_out, side);
    for (int64_t c = 0; c < side; c += RECEPTANCE_LANES) {
        const V bonus = load<V>(room.bonus + c) * broadcast(along);
        const V r = load<V>(x.receptance + c), k = load<V>(x.key + c);
        const V decay = load<V>(room.grads.fade + c), fade = load<V>(x.fade + c);
        const V kept = x.base ? decay * load<V>(x.base + c) : decay;
        store(room.grads.receptance + c, add_product(load<V>(room.grads.receptance + c), bonus, k));
        store(room.grads.key + c, add_product(load<V>(room.grads.key + c), bonus, r));
        store(room.grads.fade + c, add_product(kept, decay, fade));  // of log_decay
    }
    for (int64_t c = 0; c < side; ++c)
        room.grad_bonus[c] += (double)(along * x.receptance[c] * x.key[c]);
    const S own = own_share<V>(x, room.bonus, side);
    int64_t c = 0;
    for (; c + kFadingVectors * RECEPTANCE_LANES <= side; c += kFadingVectors * RECEPTANCE_LANES)
        gradients_of_columns<V, kFadingVectors>(room, side, x, own, c);
    for (; c < side; c += RECEPTANCE_LANES) gradients_of_columns<V, 1>(room, side, x, own, c);
    head.template store_vector<V, T>(room.grads.receptance, f.grad_receptance, t, -kAhead);
    head.template store_vector<V, S>(room.grads.fade, f.grad_log_decay, t, -kAhead);
    head.template store_vector<V, T>(room.grads.key, f.grad_key, t, -kAhead);
    head.template store_vector<V, T>(room.grads.value, f.grad_value, t, -kAhead);
}

template <class T, class V, class S>
void backward_head(const Head<Wkv6Backward>& head, const BackwardRoom<S>& room) {
    const Wkv6Backward& f = head.f;
    const int64_t side = head.side, tokens = head.tokens(), square = side * side;
    for (int64_t t = tokens; t < f.time; ++t) {
        for (void* to : {f.grad_receptance, f.grad_key, f.grad_value})
            head.template clear_vector<T>(to, t);
        head.template clear_vector<S>(f.grad_log_decay, t);
    }
    head.load_state(f.grad_state, head.state(), room.grad_state);
    load_bonus(head, room.bonus);
    std::memset(room.grad_bonus, 0, side * sizeof(double));
    for (int64_t chunk = (tokens + kWkv6Chunk - 1) / kWkv6Chunk - 1; chunk >= 0; --chunk) {
        const int64_t from = chunk * kWkv6Chunk, count = std::min(kWkv6Chunk, tokens - from);
        FadingToken<S> x[kWkv6Chunk];
        head.load_state(f.starts, head.start(chunk), room.states);
        for (int64_t i = 0; i < count; ++i) {
            S* const state = room.states + i * square;
            if (head.reset(from + i)) std::memset(state, 0, square * sizeof(S));
            x[i] = room.tokens[i].template read<T, V>(head, from + i);
            fade_and_add<V, false, S>(state, state + square, side, x[i], 0, nullptr);
        }
        for (int64_t i = count - 1; i >= 0; --i) {
            backward_token<T, V>(head, room, from + i, x[i], room.states + i * square);
            if (head.reset(from + i)) std::memset(room.grad_state, 0, square * sizeof(S));
        }
    }
    head.store_state(room.grad_state, f.grad_state_in, head.state());
    std::memcpy(f.grad_bonus + (head.b * f.heads + head.h) * f.size, room.grad_bonus,
                f.size * sizeof(double));
}

// ---- the table ----------------------------------------------------------------------------------

void forward(const Wkv6Forward& f, Element element, int threads) {
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

void backward(const Wkv6Backward& f, Element element, int threads) {
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

extern const Wkv6Kernels RECEPTANCE_TABLE(wkv6_) = {forward, backward};

}  // namespace receptance
