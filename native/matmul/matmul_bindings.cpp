// `_native.matmul` and `_native.unpack`: packed weights seen from numpy, for tests and for benchmarks.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>

#include <memory>
#include <optional>
#include <string>

#include "activation_buffer.h"
#include "cpu_info.h"

namespace nb = nanobind;

namespace pellucid {

namespace {

using Bytes = nb::ndarray<const uint8_t, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using Rows = nb::ndarray<const float, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using Output = nb::ndarray<nb::numpy, float, nb::ndim<2>, nb::c_contig>;

Output make_output(size_t rows, size_t cols) {
    auto data = std::make_unique<float[]>(rows * cols);
    float* pointer = data.get();
    nb::capsule owner(data.release(), [](void* p) noexcept { delete[] static_cast<float*>(p); });
    const size_t shape[] = {rows, cols};
    return Output(pointer, 2, shape, owner);
}

PackedMatrix pack(Arena& arena, const Bytes& data, int format, int cols) {
    if (!is_supported(format)) throw nb::value_error("the tensor type is not supported");
    PackedMatrix matrix;
    matrix.format = static_cast<WeightFormat>(format);
    matrix.rows = static_cast<int>(data.shape(0));
    matrix.cols = cols;
    if (cols % source_block_size(matrix.format) != 0 || data.shape(1) != source_row_bytes(matrix.format, cols)) {
        throw nb::value_error("the data does not have the size of its shape");
    }
    matrix.panel_bytes = packed_panel_bytes(matrix.format, cols);
    matrix.data = arena.allocate(matrix.bytes());
    if (!pack_panels(matrix, data.data(), 0, matrix.panels())) throw nb::value_error("the weights are not finite");
    return matrix;
}

Output matmul(const Bytes& weights, int format, const Rows& x, const std::optional<std::string>& isa, int row_begin,
              bool refined) {
    Arena arena;
    const PackedMatrix matrix = pack(arena, weights, format, static_cast<int>(x.shape(1)));
    const InstructionSet& set = choose_instruction_set(isa);
    const int rows = static_cast<int>(x.shape(0));
    ActivationBuffer input;
    input.resize(row_begin + rows, matrix.cols, is_quantized(matrix.format), !is_quantized(matrix.format),
                 refined ? Rounding::kRefined : Rounding::kPlain);
    for (int row = 0; row < rows; ++row) {
        input.store(*set.vector, matrix.cols, row_begin + row, 0, x.data() + static_cast<int64_t>(row) * matrix.cols,
                    matrix.cols);
    }
    Output out = make_output(x.shape(0), matrix.rows);
    set.matmul->matmul(matrix, 0, matrix.panels(), input.view(matrix.cols), row_begin, row_begin + rows,
                       out.data() - static_cast<int64_t>(row_begin) * matrix.rows, matrix.rows);
    return out;
}

Output unpack(const Bytes& weights, int format, int cols) {
    Arena arena;
    const PackedMatrix matrix = pack(arena, weights, format, cols);
    Output out = make_output(matrix.rows, cols);
    for (int row = 0; row < matrix.rows; ++row) {
        dequantize_row(matrix, row, out.data() + static_cast<int64_t>(row) * cols);
    }
    return out;
}

}  // namespace

void bind_matmul(nb::module_& module) {
    module.def(
        "matmul", &matmul, nb::arg("weights"), nb::arg("format"), nb::arg("x"), nb::arg("isa") = nb::none(),
        nb::arg("row_begin") = 0, nb::arg("refined") = false,
        "x @ weights.T in float32 [rows, out_features] for x float32 [rows, in_features] and encoded weights\n"
        "uint8 [out_features, row_bytes], packed and multiplied as in a model. `row_begin` places the rows within\n"
        "their groups of 16; `refined` gives the blocks that err most a second byte "
        "(native/include/activation_buffer.h).");
    module.def("unpack", &unpack, nb::arg("weights"), nb::arg("format"), nb::arg("cols"),
               "The weights in float32 [out_features, cols], read back from their packed form.");
}

}  // namespace pellucid
