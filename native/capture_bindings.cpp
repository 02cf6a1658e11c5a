// Reads core/capture.py StepCapture: where what a batch asks to see is to be written.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>

#include <stdexcept>
#include <string>

#include "capture.h"
#include "executor.h"

namespace nb = nanobind;

namespace pellucid {

namespace {

void require(bool condition, const char* message) {
    if (!condition) throw nb::value_error(message);
}

template <class T, size_t kDimensions>
using Array = nb::ndarray<T, nb::ndim<kDimensions>, nb::c_contig, nb::device::cpu>;

// The array itself and never a copy, which would be written to in vain.
template <class T, size_t kDimensions>
Array<T, kDimensions> array(nb::handle object) {
    Array<T, kDimensions> view;
    require(nb::try_cast(object, view, false), "an array of the capture has the wrong type, dimensions or layout");
    return view;
}

template <class T, size_t kDimensions>
bool has_shape(const Array<T, kDimensions>& view, const int (&shape)[kDimensions]) {
    for (size_t i = 0; i < kDimensions; ++i) {
        if (static_cast<int64_t>(view.shape(i)) != shape[i]) return false;
    }
    return true;
}

// A list of numbers from `low` to below `high`.
const int32_t* indices(nb::handle object, int low, int high, int& count) {
    const auto view = array<const int32_t, 1>(object);
    count = static_cast<int>(view.shape(0));
    for (int i = 0; i < count; ++i) {
        require(view.data()[i] >= low && view.data()[i] < high, "the capture names what is not there");
    }
    return view.data();
}

SequenceCapture parse_sequence(nb::handle object, const Model& model, const Batch& batch) {
    const int num_layers = static_cast<int>(model.layers.size());
    const int row = nb::cast<int>(object.attr("row"));
    require(row >= 0 && row < batch.num_seqs, "the capture names a sequence that is not in the batch");
    const int begin = batch.cu_seqlens[row], end = batch.cu_seqlens[row + 1];
    SequenceCapture wanted;
    wanted.tokens = indices(object.attr("tokens"), begin, end, wanted.num_tokens);
    wanted.queries = indices(object.attr("queries"), begin, end, wanted.num_queries);
    wanted.residual_points = indices(object.attr("residual_points"), 0, 2 * num_layers + 2, wanted.num_points);
    const auto residual = array<float, 3>(object.attr("residual"));
    require(has_shape(residual, {wanted.num_points, wanted.num_tokens, model.hidden_size}),
            "residual has the wrong shape");
    wanted.residual = residual.data();
    wanted.mlp.resize(num_layers);
    for (auto [key, value] : nb::cast<nb::dict>(object.attr("mlp"))) {
        const int layer = nb::cast<int>(key);
        require(layer >= 0 && layer < num_layers, "the capture names a layer that the model does not have");
        const auto activations = array<float, 2>(value);
        require(has_shape(activations, {wanted.num_tokens, model.layers[layer].gate_proj.rows}),
                "mlp has the wrong shape");
        wanted.mlp[layer] = activations.data();
    }
    wanted.attention.resize(num_layers);
    wanted.num_keys = batch.kv_lens[row];
    for (auto [key, value] : nb::cast<nb::dict>(object.attr("attention"))) {
        const int layer = nb::cast<int>(key);
        require(layer >= 0 && layer < num_layers, "the capture names a layer that the model does not have");
        wanted.heads = indices(object.attr("heads"), 0, model.layers[layer].num_heads, wanted.num_heads);
        const auto weights = array<float, 3>(value);
        require(has_shape(weights, {wanted.num_heads, wanted.num_queries, wanted.num_keys}),
                "attention has the wrong shape");
        wanted.attention[layer] = weights.data();
    }
    return wanted;
}

}  // namespace

// `batch` has been checked. The arrays stay the caller's.
StepCapture parse_capture(nb::handle object, const Model& model, const Batch& batch) {
    StepCapture capture;
    for (nb::handle sequence : nb::cast<nb::tuple>(object.attr("sequences"))) {
        capture.sequences.push_back(parse_sequence(sequence, model, batch));
    }
    const nb::object seconds = object.attr("seconds");
    if (!seconds.is_none()) {
        const auto view = array<double, 1>(seconds);
        require(has_shape(view, {static_cast<int>(model.layers.size()) * kLayerOperations + 3}),
                "seconds has the wrong shape");
        capture.seconds = view.data();
    }
    return capture;
}

}  // namespace pellucid
