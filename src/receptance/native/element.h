// The types of numbers that the kernels of the operators read and write.
#pragma once

namespace receptance {

enum class Element { float32, float64, bfloat16 };

}  // namespace receptance
