// The Python module receptance._native. It takes raw addresses and knows nothing of torch's ABI.

#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <chrono>
#include <iterator>
#include <memory>
#include <stdexcept>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "parallel.h"
#include "rwkv4.h"
#include "rwkv6.h"
#include "rwkv7.h"
#include "wkv4.h"
#include "wkv6.h"
#include "wkv7.h"

namespace nb = nanobind;
using namespace receptance;

namespace {

struct InstructionSet {
    const char* name;
    const Wkv4Kernels* wkv4;
    const Wkv6Kernels* wkv6;
    const Wkv7Kernels* wkv7;
    const ModelKernels* model;
    const Rwkv4Kernels* rwkv4;
    const Rwkv5Kernels* rwkv5;
    const Rwkv6Kernels* rwkv6;
    const Rwkv7Kernels* rwkv7;
};

// What a set adds to `base` serves the models alone; the operators' kernels are those of `base`.
#define RECEPTANCE_KERNELS_OF(set, base) \
    {#set,         &wkv4_##base,  &wkv6_##base,  &wkv7_##base,  &model_##set, \
     &rwkv4_##set, &rwkv5_##set, &rwkv6_##set, &rwkv7_##set}

// The instruction sets that this machine can run, the fastest first.
std::vector<InstructionSet> runnable() {
    std::vector<InstructionSet> found;
#if defined(RECEPTANCE_X86)
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
        __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512bw")) {
        if (__builtin_cpu_supports("avx512vnni"))
            found.push_back(RECEPTANCE_KERNELS_OF(avx512vnni, avx512));
        found.push_back(RECEPTANCE_KERNELS_OF(avx512, avx512));
    }
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
        __builtin_cpu_supports("f16c")) {
#if defined(RECEPTANCE_AVXVNNI)
        if (__builtin_cpu_supports("avxvnni"))
            found.push_back(RECEPTANCE_KERNELS_OF(avxvnni, avx2));
#endif
        found.push_back(RECEPTANCE_KERNELS_OF(avx2, avx2));
    }
#endif
    found.push_back(RECEPTANCE_KERNELS_OF(portable, portable));
    return found;
}

const InstructionSet& kernels(const std::string& instruction_set) {
    static const auto available = runnable();
    if (instruction_set.empty()) return available.front();
    for (const InstructionSet& k : available)
        if (instruction_set == k.name) return k;
    throw std::invalid_argument("instruction set " + instruction_set + " is not available here");
}

template <class T>
T* pointer(uintptr_t address) {
    return reinterpret_cast<T*>(address);
}

using Addresses = std::vector<uintptr_t>;

// Python and C++ agree about addresses by their order, so a wrong number of them must not be read.
void check_count(const std::string& of, size_t found, size_t wanted,
                 const char* what = "addresses") {
    if (found != wanted)
        throw std::invalid_argument(of + " takes " + std::to_string(wanted) + " " + what +
                                    " and was given " + std::to_string(found));
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

void wkv6_forward(int64_t batch, int64_t time, int64_t heads, int64_t size, int element,
                  int threads, const std::string& instruction_set, const Addresses& p) {
    check_count("wkv6_forward", p.size(), 11);
    Wkv6Forward f{batch, time, heads, size, pointer<void>(p[0]), pointer<void>(p[1]),
                  pointer<void>(p[2]), pointer<void>(p[3]), pointer<void>(p[4]),
                  pointer<void>(p[5]), pointer<bool>(p[6]), pointer<int64_t>(p[7]),
                  pointer<void>(p[8]), pointer<void>(p[9]), pointer<void>(p[10])};
    const Wkv6Kernels& k = *kernels(instruction_set).wkv6;
    nb::gil_scoped_release release;
    k.forward(f, static_cast<Element>(element), threads);
}

void wkv6_backward(int64_t batch, int64_t time, int64_t heads, int64_t size, int element,
                   int threads, const std::string& instruction_set, const Addresses& p) {
    check_count("wkv6_backward", p.size(), 16);
    Wkv6Backward f{batch, time, heads, size, pointer<void>(p[0]), pointer<void>(p[1]),
                   pointer<void>(p[2]), pointer<void>(p[3]), pointer<void>(p[4]),
                   pointer<void>(p[5]), pointer<void>(p[6]), pointer<void>(p[7]),
                   pointer<bool>(p[8]), pointer<int64_t>(p[9]), pointer<void>(p[10]),
                   pointer<void>(p[11]), pointer<void>(p[12]), pointer<void>(p[13]),
                   pointer<double>(p[14]), pointer<void>(p[15])};
    const Wkv6Kernels& k = *kernels(instruction_set).wkv6;
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

const Rwkv4Kernels& kernels_of(const InstructionSet& set, const Rwkv4Weights&) { return *set.rwkv4; }
const Rwkv5Kernels& kernels_of(const InstructionSet& set, const Rwkv5Weights&) { return *set.rwkv5; }
const Rwkv6Kernels& kernels_of(const InstructionSet& set, const Rwkv6Weights&) { return *set.rwkv6; }
const Rwkv7Kernels& kernels_of(const InstructionSet& set, const Rwkv7Weights&) { return *set.rwkv7; }

// A model's weights, which Python owns, and memory to work in. Only one call at a time may use it.
template <class Weights>
class NativeModel {
public:
    NativeModel(int64_t width, int64_t ffn_width, int64_t vocab_size, float epsilon,
                float final_epsilon, const std::vector<double>& numbers, const Addresses& vectors,
                const std::vector<MatrixFields>& matrices, const std::string& instruction_set)
        : model_(*kernels(instruction_set).model),
          kernels_(kernels_of(kernels(instruction_set), weights_)) {
        check_weights(vectors.size(), matrices.size());
        check_count(Weights::kName, numbers.size(), Weights::kNumbers, "numbers");
        auto vector = vectors.begin();
        auto fields = matrices.begin();
        const auto next = [&] { return pointer<const float>(*vector++); };
        const auto next_matrix = [&] { return matrix(*fields++); };
        weights_.width = width;
        weights_.ffn_width = ffn_width;
        weights_.vocab_size = vocab_size;
        weights_.epsilon = epsilon;
        weights_.final_epsilon = final_epsilon;
        weights_.set_numbers(numbers);
        weights_.embedding = next_matrix();
        weights_.head = next_matrix();
        for (const float** v : {&weights_.ln0_weight, &weights_.ln0_bias, &weights_.ln_out_weight,
                                &weights_.ln_out_bias})
            *v = next();
        while (vector != vectors.end()) {
            typename Weights::Layer layer;
            for (const auto v : Weights::kVectors) layer.*v = next();
            for (const auto m : Weights::kMatrices) layer.*m = next_matrix();
            weights_.layers.push_back(layer);
        }
    }

    // Runs a pass; returns how many inputs of the ffn.value matrices were not zero. The addresses
    // are those of starts, tokens, resets, the parts of the state before the pass, those after it,
    // and the features.
    int64_t features(int64_t rows, int64_t positions, const Addresses& p, int threads) {
        constexpr int kParts = Weights::kParts;
        check_count(Weights::kName + std::string(".features"), p.size(), 4 + 2 * kParts);
        Pass pass{rows, positions, pointer<int64_t>(p[0]), pointer<int64_t>(p[1]),
                  pointer<bool>(p[2]), {}, pointer<float>(p[3 + 2 * kParts]), 0};
        for (int part = 0; part < kParts; ++part)
            pass.state.push_back({pointer<float>(p[3 + part]), pointer<float>(p[3 + kParts + part]),
                                  weights_.part_size(part)});
        nb::gil_scoped_release release;
        kernels_.features(weights_, pass, features_, threads);
        return pass.nonzero;
    }

    void head(int64_t count, uintptr_t features, uintptr_t logits, int threads) {
        nb::gil_scoped_release release;
        model_.head(weights_, pointer<float>(features), count, pointer<float>(logits), head_,
                    threads);
    }

    static void bind(nb::module_& m) {
        nb::class_<NativeModel>(m, Weights::kName)
            .def(nb::init<int64_t, int64_t, int64_t, float, float, const std::vector<double>&,
                          const Addresses&, const std::vector<MatrixFields>&, const std::string&>())
            .def("features", &NativeModel::features)
            .def("head", &NativeModel::head);
    }

private:
    static void check_weights(int64_t vectors, int64_t matrices) {
        const int64_t layer_vectors = std::size(Weights::kVectors);
        const int64_t layer_matrices = std::size(Weights::kMatrices);
        const int64_t layers = (vectors - kOuterVectors) / layer_vectors;
        if (vectors == kOuterVectors + layers * layer_vectors &&
            matrices == kOuterMatrices + layers * layer_matrices)
            return;
        const auto numbers = [](int64_t outer, int64_t layer) {
            return std::to_string(outer) + " and " + std::to_string(layer) + " per layer";
        };
        throw std::invalid_argument(
            std::string(Weights::kName) + " takes vectors (" + numbers(kOuterVectors, layer_vectors) +
            ") and matrices (" + numbers(kOuterMatrices, layer_matrices) + ") and was given " +
            std::to_string(vectors) + " vectors and " + std::to_string(matrices) + " matrices");
    }

    static constexpr int64_t kOuterVectors = 4, kOuterMatrices = 2;  // Those of OuterWeights.

    Weights weights_{};
    const ModelKernels& model_;
    const decltype(kernels_of(std::declval<InstructionSet>(), std::declval<Weights>()))& kernels_;
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
        sum = kernels("").model->read(data, bytes, threads);
        const std::chrono::duration<double> took = std::chrono::steady_clock::now() - begin;
        best = std::max(best, bytes / took.count() / 1e9);
    }
    return best;
}

}  // namespace

NB_MODULE(_native, m) {
    m.attr("CHUNK") = kChunk;
    m.attr("WKV6_CHUNK") = kWkv6Chunk;
    m.attr("WKV7_CHUNK") = kWkv7Chunk;
    m.def("instruction_sets", [] {
        std::vector<std::string> names;
        for (const InstructionSet& k : runnable()) names.emplace_back(k.name);
        return names;
    });
    m.def("shares_torch_threads", [] { return shared_openmp() != nullptr; });
    m.def("wkv4_forward", &forward);
    m.def("wkv4_backward", &backward);
    m.def("wkv6_forward", &wkv6_forward);
    m.def("wkv6_backward", &wkv6_backward);
    m.def("wkv7_forward", &wkv7_forward);
    m.def("wkv7_backward", &wkv7_backward);
    NativeModel<Rwkv4Weights>::bind(m);
    NativeModel<Rwkv5Weights>::bind(m);
    NativeModel<Rwkv6Weights>::bind(m);
    NativeModel<Rwkv7Weights>::bind(m);
    m.def("read_bandwidth", &read_bandwidth);
}
