// What the sources that are compiled once per instruction set share besides their vectors.
//
// CMakeLists.txt defines RECEPTANCE_KERNELS as the instruction set's name, for example avx2.
#pragma once

namespace receptance {

// The exponent of a state that has seen no token: EMPTY_EXPONENT in ops/reference.py.
constexpr float kEmptyExponent = -1e30f;

}  // namespace receptance

#define RECEPTANCE_TEXT_OF(x) #x
#define RECEPTANCE_TEXT(x) RECEPTANCE_TEXT_OF(x)
#define RECEPTANCE_JOIN_OF(a, b) a##b
#define RECEPTANCE_JOIN(a, b) RECEPTANCE_JOIN_OF(a, b)

// The instruction set's name as a string, and `prefix` followed by it as an identifier.
#define RECEPTANCE_KERNELS_NAME RECEPTANCE_TEXT(RECEPTANCE_KERNELS)
#define RECEPTANCE_TABLE(prefix) RECEPTANCE_JOIN(prefix, RECEPTANCE_KERNELS)
