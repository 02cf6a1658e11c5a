// `_native.kernels`: the vector kernels of every instruction set this machine has, on numpy arrays. For tests,
// documents and curiosity; inference calls the tables directly.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>

#include <algorithm>
#include <cstring>
#include <memory>
#include <string>
#include <tuple>
#include <vector>

#include "cpuid_features.h"
#include "vector_kernels.h"

namespace nb = nanobind;

namespace pellucid {
namespace {

template <typename T>
using Output = nb::ndarray<nb::numpy, T, nb::c_contig>;
using Vector = nb::ndarray<const float, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Matrix = nb::ndarray<const float, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using Bytes = nb::ndarray<const int8_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Indices = nb::ndarray<const int32_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using MutableVector = nb::ndarray<float, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using MutableMatrix = nb::ndarray<float, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using KvBlock = nb::ndarray<nb::ro, nb::c_contig, nb::device::cpu>;
using MutableKvBlock = nb::ndarray<nb::c_contig, nb::device::cpu>;

template <typename T>
Output<T> make_array(std::initializer_list<size_t> shape) {
    size_t size = 1;
    for (const size_t n : shape) size *= n;
    auto data = std::make_unique<T[]>(std::max<size_t>(size, 1));
    T* pointer = data.get();
    nb::capsule owner(data.release(), [](void* p) noexcept { delete[] static_cast<T*>(p); });
    return Output<T>(pointer, shape.size(), shape.begin(), owner);
}

template <typename T>
Output<float> copy_of(const T& x) {
    auto out = make_array<float>({x.size()});
    std::copy_n(x.data(), x.size(), out.data());
    return out;
}

void require(bool condition, const std::string& message) {
    if (!condition) throw nb::value_error(message.c_str());
}

void require_equal(size_t found, size_t wanted, const char* name) {
    require(found == wanted,
            std::string(name) + " has " + std::to_string(found) + " values, expected " + std::to_string(wanted));
}

void require_head_dim(KvType type, size_t head_dim) {
    const auto step = static_cast<size_t>(kv_head_dim_step(type));
    require(head_dim >= step && head_dim % step == 0 && head_dim <= kMaxHeadDim,
            "head_dim is " + std::to_string(head_dim) + ", expected a multiple of " + std::to_string(step) + " up to " +
                std::to_string(kMaxHeadDim));
}

void require_block(const auto& block, KvType type, size_t head_dim, const char* name) {
    const auto wanted = static_cast<size_t>(kv_block_bytes(type, static_cast<int>(head_dim)));
    require(block.nbytes() == wanted, std::string(name) + " has " + std::to_string(block.nbytes()) +
                                          " bytes, expected " + std::to_string(wanted));
}

int length(const auto& x) { return static_cast<int>(x.size()); }

bool runs_here([[maybe_unused]] const VectorKernels& kernels) {
#if defined(__x86_64__) || defined(_M_X64)
    if (&kernels == &kVectorKernelsAvx2) return cpuid_features().has_avx2();
    if (&kernels == &kVectorKernelsAvx512) return cpuid_features().has_avx512();
#endif
    return true;
}

// One instruction set's table; immutable and static, so a plain pointer.
struct Kernels {
    const VectorKernels* table;

    Output<float> rms_norm(const Vector& x, const Vector& weight, float eps) const {
        require_equal(weight.size(), x.size(), "weight");
        auto out = make_array<float>({x.size()});
        table->rms_norm(x.data(), weight.data(), eps, length(x), out.data());
        return out;
    }

    Output<float> rope(const Vector& x, const Vector& cos, const Vector& sin) const {
        require(cos.size() * 2 <= x.size(), "cos has more than half as many values as x");
        require_equal(sin.size(), cos.size(), "sin");
        auto out = copy_of(x);
        table->rope(out.data(), cos.data(), sin.data(), 2 * length(cos));
        return out;
    }

    Output<float> add(const Vector& x, const Vector& y) const {
        require_equal(y.size(), x.size(), "y");
        auto out = copy_of(x);
        table->add(out.data(), y.data(), length(x));
        return out;
    }

    Output<float> scale(const Vector& x, float factor) const {
        auto out = copy_of(x);
        table->scale(out.data(), factor, length(x));
        return out;
    }

    Output<float> silu_mul(const Vector& gate, const Vector& up) const {
        require_equal(up.size(), gate.size(), "up");
        auto out = make_array<float>({gate.size()});
        table->silu_mul(gate.data(), up.data(), length(gate), out.data());
        return out;
    }

    Output<float> gelu_tanh_mul(const Vector& gate, const Vector& up) const {
        require_equal(up.size(), gate.size(), "up");
        auto out = make_array<float>({gate.size()});
        table->gelu_tanh_mul(gate.data(), up.data(), length(gate), out.data());
        return out;
    }

    auto quantize(const Vector& x) const {
        require(x.size() % kQuantBlockSize == 0,
                "x has " + std::to_string(x.size()) + " values, expected a multiple of 32");
        const size_t blocks = x.size() / kQuantBlockSize;
        auto q = make_array<int8_t>({x.size()});
        auto scale = make_array<float>({blocks}), scaled_sum = make_array<float>({blocks});
        auto sum = make_array<int32_t>({blocks});
        std::vector<QuantBlock> out(blocks);
        table->quantize(x.data(), length(x), 1, q.data(), out.data());
        for (size_t i = 0; i < blocks; ++i) {
            scale.data()[i] = out[i].scale;
            sum.data()[i] = out[i].sum;
            scaled_sum.data()[i] = out[i].scaled_sum;
        }
        return std::tuple(q, scale, sum, scaled_sum);
    }

    auto quantize_rest(const Vector& x, const Bytes& q, float scale) const {
        require_equal(x.size(), kQuantBlockSize, "x");
        require_equal(q.size(), kQuantBlockSize, "q");
        auto low = make_array<int8_t>({x.size()});
        const int32_t sum = table->quantize_rest(x.data(), q.data(), scale, low.data());
        return std::tuple(low, sum);
    }

    void kv_store(const std::string& kv_type, const MutableKvBlock& key_block, const MutableKvBlock& value_block,
                  int slot, const Vector& key, const Vector& value) const {
        const KvType type = kv_type_named(kv_type.c_str());
        require_head_dim(type, key.size());
        require_equal(value.size(), key.size(), "value");
        require_block(key_block, type, key.size(), "key_block");
        require_block(value_block, type, key.size(), "value_block");
        require(slot >= 0 && slot < kKvBlockSize, "slot is " + std::to_string(slot) + ", expected 0 to 63");
        table->kv_store(type, key_block.data(), value_block.data(), length(key), slot, key.data(), value.data());
    }

    auto attention_block(const std::string& kv_type, const KvBlock& key_block, const KvBlock& value_block,
                         const Matrix& query, const Indices& begin, const Indices& end) const {
        const KvType type = kv_type_named(kv_type.c_str());
        const size_t num_queries = query.shape(0), head_dim = query.shape(1);
        require_head_dim(type, head_dim);
        require_block(key_block, type, head_dim, "key_block");
        require_block(value_block, type, head_dim, "value_block");
        require_equal(begin.size(), num_queries, "begin");
        require_equal(end.size(), num_queries, "end");
        for (size_t i = 0; i < num_queries; ++i) {
            require(begin.data()[i] >= 0 && begin.data()[i] <= kKvBlockSize && end.data()[i] >= 0 &&
                        end.data()[i] <= kKvBlockSize,
                    "begin and end must lie in 0 to 64");
        }
        auto max = make_array<float>({num_queries}), sum = make_array<float>({num_queries});
        auto out = make_array<float>({num_queries, head_dim});
        const auto floats =
            static_cast<size_t>(attention_scratch_floats(static_cast<int>(num_queries), static_cast<int>(head_dim)));
        std::vector<float> scratch(floats + 16);
        void* aligned = scratch.data();
        size_t space = scratch.size() * sizeof(float);
        std::align(64, floats * sizeof(float), aligned, space);
        table->attention_block(type, key_block.data(), value_block.data(), static_cast<int>(head_dim), query.data(),
                               static_cast<int64_t>(head_dim), static_cast<int>(num_queries), begin.data(), end.data(),
                               max.data(), sum.data(), out.data(), static_cast<float*>(aligned));
        return std::tuple(max, sum, out);
    }

    void attention_fold(const MutableVector& running_max, const MutableVector& running_sum,
                        const MutableMatrix& running_out, const Vector& max, const Vector& sum,
                        const Matrix& out) const {
        const size_t rows = running_out.shape(0), head_dim = running_out.shape(1);
        require_equal(running_max.size(), rows, "running_max");
        require_equal(running_sum.size(), rows, "running_sum");
        require_equal(max.size(), rows, "max");
        require_equal(sum.size(), rows, "sum");
        require_equal(out.size(), rows * head_dim, "out");
        table->attention_fold(static_cast<int>(head_dim), static_cast<int>(rows), running_max.data(),
                              running_sum.data(), running_out.data(), max.data(), sum.data(), out.data());
    }

    Output<float> attention_finish(const Vector& running_out, float running_sum) const {
        auto out = make_array<float>({running_out.size()});
        table->attention_finish(length(running_out), running_out.data(), running_sum, out.data());
        return out;
    }

    bool all_finite(const Vector& x) const { return table->all_finite(x.data(), static_cast<int64_t>(x.size())); }
};

}  // namespace

void bind_kernels(nb::module_& parent) {
    nb::module_ m = parent.def_submodule(
        "kernels",
        "The vector kernels of each instruction set this machine has.\n\n"
        "`instruction_sets` maps a name ('portable', 'avx2', 'avx512') to its Kernels. Arrays are float32 and\n"
        "C-contiguous unless stated; a wrong length raises ValueError, a wrong dtype TypeError.");

    nb::class_<Kernels>(m, "Kernels", "One instruction set's kernels; native/include/vector_kernels.h is the contract.")
        .def_prop_ro("name", [](const Kernels& k) { return k.table->name; })
        .def("rms_norm", &Kernels::rms_norm, nb::arg("x").noconvert(), nb::arg("weight").noconvert(), nb::arg("eps"),
             "x / sqrt(mean(x^2) + eps) * weight, [n] (Zhang and Sennrich 2019).")
        .def("rope", &Kernels::rope, nb::arg("x").noconvert(), nb::arg("cos").noconvert(), nb::arg("sin").noconvert(),
             "x [n] with its first 2 * len(cos) values rotated in half-split pairs (i, i + len(cos)) (Su et al. 2021).")
        .def("add", &Kernels::add, nb::arg("x").noconvert(), nb::arg("y").noconvert(), "x + y, [n].")
        .def("scale", &Kernels::scale, nb::arg("x").noconvert(), nb::arg("factor"), "x * factor, [n].")
        .def("silu_mul", &Kernels::silu_mul, nb::arg("gate").noconvert(), nb::arg("up").noconvert(),
             "gate / (1 + exp(-gate)) * up, [n].")
        .def("gelu_tanh_mul", &Kernels::gelu_tanh_mul, nb::arg("gate").noconvert(), nb::arg("up").noconvert(),
             "gate / 2 * (1 + tanh(sqrt(2 / pi) * (gate + 0.044715 * gate^3))) * up, [n].")
        .def("quantize", &Kernels::quantize, nb::arg("x").noconvert(),
             "(q int8 [n], scale [n / 32], sum int32 [n / 32], scaled_sum [n / 32]) of x [n], n a multiple of 32.")
        .def("quantize_rest", &Kernels::quantize_rest, nb::arg("x").noconvert(), nb::arg("q").noconvert(),
             nb::arg("scale"),
             "(low int8 [32], its sum): what rounding one block x [32] to scale * q left, in steps of scale / 256.")
        .def("kv_store", &Kernels::kv_store, nb::arg("kv_type"), nb::arg("key_block").noconvert(),
             nb::arg("value_block").noconvert(), nb::arg("slot"), nb::arg("key").noconvert(),
             nb::arg("value").noconvert(),
             "Writes one token's key and value [head_dim] into slot 0..63 of a block: two arrays of any\n"
             "dtype with the bytes of 64 * head_dim elements of kv_type 'f32', 'f16', 'bf16' or 'q8'.")
        .def("attention_block", &Kernels::attention_block, nb::arg("kv_type"), nb::arg("key_block").noconvert(),
             nb::arg("value_block").noconvert(), nb::arg("query").noconvert(), nb::arg("begin").noconvert(),
             nb::arg("end").noconvert(),
             "(max [rows], sum [rows], out [rows, head_dim]): the partial attention of query [rows, head_dim] over\n"
             "slots begin[i] <= slot < end[i] (int32) of one block (Dao et al. 2022, section 3.1).")
        .def("attention_fold", &Kernels::attention_fold, nb::arg("running_max").noconvert(),
             nb::arg("running_sum").noconvert(), nb::arg("running_out").noconvert(), nb::arg("max").noconvert(),
             nb::arg("sum").noconvert(), nb::arg("out").noconvert(),
             "Folds one block's partial result into the running one, in place.")
        .def("attention_finish", &Kernels::attention_finish, nb::arg("running_out").noconvert(), nb::arg("running_sum"),
             "running_out / running_sum, [head_dim].")
        .def("all_finite", &Kernels::all_finite, nb::arg("x").noconvert(), "Whether no value is inf or NaN.")
        .def("__repr__", [](const Kernels& k) { return std::string("Kernels('") + k.table->name + "')"; });

    nb::dict instruction_sets;
    const auto expose = [&](const VectorKernels& table) {
        if (runs_here(table)) instruction_sets[table.name] = Kernels{&table};
    };
    expose(kVectorKernelsPortable);
#if defined(__x86_64__) || defined(_M_X64)
    expose(kVectorKernelsAvx2);
    expose(kVectorKernelsAvx512);
#endif
    m.attr("instruction_sets") = instruction_sets;
}

}  // namespace pellucid
