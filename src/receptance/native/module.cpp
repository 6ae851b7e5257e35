// The Python module receptance._native. It takes raw addresses and knows nothing of torch's ABI.

#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <chrono>
#include <memory>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include "parallel.h"
#include "rwkv4.h"
#include "wkv4.h"
#include "wkv7.h"

namespace nb = nanobind;
using namespace receptance;

namespace {

struct InstructionSet {
    const Wkv4Kernels* wkv4;
    const Rwkv4Kernels* rwkv4;
    const Wkv7Kernels* wkv7;
};

// The instruction sets that this machine can run, the fastest first.
std::vector<InstructionSet> runnable() {
    std::vector<InstructionSet> found;
#if defined(RECEPTANCE_X86)
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
        __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512bw")) {
        if (__builtin_cpu_supports("avx512vnni"))
            found.push_back({&wkv4_avx512vnni, &rwkv4_avx512vnni, &wkv7_avx512vnni});
        found.push_back({&wkv4_avx512, &rwkv4_avx512, &wkv7_avx512});
    }
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
        __builtin_cpu_supports("f16c"))
        found.push_back({&wkv4_avx2, &rwkv4_avx2, &wkv7_avx2});
#endif
    found.push_back({&wkv4_portable, &rwkv4_portable, &wkv7_portable});
    return found;
}

const InstructionSet& kernels(const std::string& instruction_set) {
    static const auto available = runnable();
    if (instruction_set.empty()) return available.front();
    for (const InstructionSet& k : available)
        if (instruction_set == k.wkv4->name) return k;
    throw std::invalid_argument("instruction set " + instruction_set + " is not available here");
}

template <class T>
T* pointer(uintptr_t address) {
    return reinterpret_cast<T*>(address);
}

using Addresses = std::vector<uintptr_t>;

// Python and C++ agree about addresses by their order, so a wrong number of them must not be read.
void check_count(const char* of, size_t found, size_t wanted) {
    if (found != wanted)
        throw std::invalid_argument(std::string(of) + " takes " + std::to_string(wanted) +
                                    " addresses and was given " + std::to_string(found));
}

void forward(int64_t batch, int64_t time, int64_t width, int element, int threads,
             const std::string& instruction_set, const Addresses& p) {
    check_count("wkv4_forward", p.size(), 14);
    Forward f{batch, time, width, pointer<void>(p[0]), pointer<void>(p[1]), pointer<void>(p[2]),
              pointer<void>(p[3]), pointer<void>(p[4]), pointer<void>(p[5]), pointer<void>(p[6]),
              pointer<bool>(p[7]), pointer<int64_t>(p[8]), pointer<void>(p[9]),
              pointer<void>(p[10]), pointer<void>(p[11]), pointer<void>(p[12]),
              pointer<void>(p[13])};
    const Wkv4Kernels& k = *kernels(instruction_set).wkv4;
    nb::gil_scoped_release release;
    k.forward(f, static_cast<Element>(element), threads);
}

void backward(int64_t batch, int64_t time, int64_t width, int element, int threads,
              const std::string& instruction_set, const Addresses& p) {
    check_count("wkv4_backward", p.size(), 16);
    Backward f{batch, time, width, pointer<void>(p[0]), pointer<void>(p[1]), pointer<void>(p[2]),
               pointer<void>(p[3]), pointer<void>(p[4]), pointer<void>(p[5]), pointer<void>(p[6]),
               pointer<void>(p[7]), pointer<bool>(p[8]), pointer<int64_t>(p[9]),
               pointer<double>(p[10]), pointer<double>(p[11]), pointer<void>(p[12]),
               pointer<void>(p[13]), pointer<void>(p[14]), pointer<void>(p[15])};
    const Wkv4Kernels& k = *kernels(instruction_set).wkv4;
    nb::gil_scoped_release release;
    k.backward(f, static_cast<Element>(element), threads);
}

void wkv7_forward(int64_t batch, int64_t time, int64_t heads, int64_t size, int element,
                  int threads, const std::string& instruction_set, const Addresses& p) {
    check_count("wkv7_forward", p.size(), 12);
    Wkv7Forward f{batch, time, heads, size, pointer<void>(p[0]), pointer<void>(p[1]),
                  pointer<void>(p[2]), pointer<void>(p[3]), pointer<void>(p[4]),
                  pointer<void>(p[5]), pointer<void>(p[6]), pointer<bool>(p[7]),
                  pointer<int64_t>(p[8]), pointer<void>(p[9]), pointer<void>(p[10]),
                  pointer<void>(p[11])};
    const Wkv7Kernels& k = *kernels(instruction_set).wkv7;
    nb::gil_scoped_release release;
    k.forward(f, static_cast<Element>(element), threads);
}

void wkv7_backward(int64_t batch, int64_t time, int64_t heads, int64_t size, int element,
                   int threads, const std::string& instruction_set, const Addresses& p) {
    check_count("wkv7_backward", p.size(), 18);
    Wkv7Backward f{batch, time, heads, size, pointer<void>(p[0]), pointer<void>(p[1]),
                   pointer<void>(p[2]), pointer<void>(p[3]), pointer<void>(p[4]),
                   pointer<void>(p[5]), pointer<void>(p[6]), pointer<void>(p[7]),
                   pointer<void>(p[8]), pointer<bool>(p[9]), pointer<int64_t>(p[10]),
                   pointer<void>(p[11]), pointer<void>(p[12]), pointer<void>(p[13]),
                   pointer<void>(p[14]), pointer<void>(p[15]), pointer<void>(p[16]),
                   pointer<void>(p[17])};
    const Wkv7Kernels& k = *kernels(instruction_set).wkv7;
    nb::gil_scoped_release release;
    k.backward(f, static_cast<Element>(element), threads);
}

// ---- whole models -------------------------------------------------------------------------------

using MatrixFields = std::tuple<int, int64_t, int64_t, int64_t, uintptr_t, uintptr_t>;

Matrix matrix(const MatrixFields& f) {
    const auto [kind, outputs, inputs, group, data, params] = f;
    return {static_cast<Kind>(kind),  outputs, inputs, group, pointer<const void>(data),
            pointer<const uint16_t>(params)};
}

// A model's weights, which Python owns, and memory to work in. Only one call at a time may use it.
class Rwkv4 {
public:
    Rwkv4(int64_t width, int64_t ffn_width, int64_t vocab_size, float epsilon, float final_epsilon,
          const Addresses& vectors, const std::vector<MatrixFields>& matrices,
          const std::string& instruction_set)
        : kernels_(*kernels(instruction_set).rwkv4) {
        check_weights(vectors.size(), matrices.size());
        auto vector = vectors.begin();
        auto fields = matrices.begin();
        const auto next = [&] { return pointer<const float>(*vector++); };
        const auto next_matrix = [&] { return matrix(*fields++); };
        weights_ = {width, ffn_width, vocab_size, epsilon, final_epsilon, {}, {}, 0, 0, 0, 0, {}};
        weights_.embedding = next_matrix();
        weights_.head = next_matrix();
        for (const float** v : {&weights_.ln0_weight, &weights_.ln0_bias, &weights_.ln_out_weight,
                                &weights_.ln_out_bias})
            *v = next();
        while (vector != vectors.end()) {
            LayerWeights l;
            for (const float** v :
                 {&l.ln1_weight, &l.ln1_bias, &l.ln2_weight, &l.ln2_bias, &l.log_decay, &l.bonus,
                  &l.time_mix_k, &l.time_mix_v, &l.time_mix_r, &l.channel_mix_k, &l.channel_mix_r})
                *v = next();
            for (Matrix* m : {&l.key, &l.value, &l.receptance, &l.output, &l.ffn_key,
                              &l.ffn_receptance, &l.ffn_value})
                *m = next_matrix();
            weights_.layers.push_back(l);
        }
    }

    // Runs a pass; returns how many inputs of the ffn.value matrices were not zero.
    int64_t features(int64_t rows, int64_t positions, const Addresses& p, int threads) {
        check_count("Rwkv4.features", p.size(), 14);
        const auto parts = [&](int first) {
            return StateParts{pointer<float>(p[first]), pointer<float>(p[first + 1]),
                              pointer<float>(p[first + 2]), pointer<float>(p[first + 3]),
                              pointer<float>(p[first + 4])};
        };
        Pass pass{rows, positions, pointer<int64_t>(p[0]), pointer<int64_t>(p[1]),
                  pointer<bool>(p[2]), parts(3), parts(8), pointer<float>(p[13]), 0};
        nb::gil_scoped_release release;
        kernels_.features(weights_, pass, features_, threads);
        return pass.nonzero;
    }

    void head(int64_t count, uintptr_t features, uintptr_t logits, int threads) {
        nb::gil_scoped_release release;
        kernels_.head(weights_, pointer<float>(features), count, pointer<float>(logits), head_,
                      threads);
    }

private:
    static void check_weights(int64_t vectors, int64_t matrices) {
        const int64_t layers = (vectors - kOtherVectors) / kLayerVectors;
        if (vectors == kOtherVectors + layers * kLayerVectors &&
            matrices == kOtherMatrices + layers * kLayerMatrices)
            return;
        const auto numbers = [](int64_t other, int64_t layer) {
            return std::to_string(other) + " and " + std::to_string(layer) + " per layer";
        };
        throw std::invalid_argument(
            "Rwkv4 takes vectors (" + numbers(kOtherVectors, kLayerVectors) + ") and matrices (" +
            numbers(kOtherMatrices, kLayerMatrices) + ") and was given " +
            std::to_string(vectors) + " vectors and " + std::to_string(matrices) + " matrices");
    }

    const Rwkv4Kernels& kernels_;
    Rwkv4Weights weights_;
    Workspace features_, head_;
};

// Returns the speed in GB/s at which `threads` threads read the bytes at an address: the best of
// several passes.
double read_bandwidth(uintptr_t address, int64_t bytes, int threads) {
    const auto* data = reinterpret_cast<const char*>(address);
    volatile uint32_t sum = 0;
    double best = 0;
    nb::gil_scoped_release release;
    for (int repeat = 0; repeat < 7; ++repeat) {
        const auto begin = std::chrono::steady_clock::now();
        sum = kernels("").rwkv4->read(data, bytes, threads);
        const std::chrono::duration<double> took = std::chrono::steady_clock::now() - begin;
        best = std::max(best, bytes / took.count() / 1e9);
    }
    return best;
}

}  // namespace

NB_MODULE(_native, m) {
    m.attr("CHUNK") = kChunk;
    m.attr("WKV7_CHUNK") = kWkv7Chunk;
    m.def("instruction_sets", [] {
        std::vector<std::string> names;
        for (const InstructionSet& k : runnable()) names.emplace_back(k.wkv4->name);
        return names;
    });
    m.def("shares_torch_threads", [] { return shared_openmp() != nullptr; });
    m.def("wkv4_forward", &forward);
    m.def("wkv4_backward", &backward);
    m.def("wkv7_forward", &wkv7_forward);
    m.def("wkv7_backward", &wkv7_backward);
    nb::class_<Rwkv4>(m, "Rwkv4")
        .def(nb::init<int64_t, int64_t, int64_t, float, float, const Addresses&,
                      const std::vector<MatrixFields>&, const std::string&>())
        .def("features", &Rwkv4::features)
        .def("head", &Rwkv4::head);
    m.def("read_bandwidth", &read_bandwidth);
}
