// The Python module `_native`: a model to load and run, and what the other files of the core bind.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <atomic>
#include <map>
#include <memory>
#include <optional>
#include <stdexcept>
#include <string>

#include "executor.h"
#include "sampling/sampling_bindings.h"

namespace nb = nanobind;

namespace pellucid {

void bind_kernels(nb::module_& module);
void bind_matmul(nb::module_& module);
void bind_peaks(nb::module_& module);
void bind_sampling(nb::module_& module);
StepCapture parse_capture(nb::handle object, const Model& model, const Batch& batch);

namespace {

template <class T>
using Vector = nb::ndarray<const T, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
template <class T>
using Matrix = nb::ndarray<const T, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
template <class T>
using MutableMatrix = nb::ndarray<T, nb::ndim<2>, nb::c_contig, nb::device::cpu>;

// [num_groups][num_seqs][max_blocks]; a view into larger tables.
using BlockTables = nb::ndarray<const int32_t, nb::ndim<3>, nb::device::cpu>;

template <class T>
T get(const nb::dict& fields, const char* name) {
    return nb::cast<T>(fields[name]);
}

void require(bool condition, const std::string& message) {
    if (!condition) throw nb::value_error(message.c_str());
}

// One model with its threads and its KV cache. Calls are made by one thread at a time.
class NativeModel {
  public:
    NativeModel(const nb::dict& spec, int num_threads, const std::string& kv_type,
                const std::optional<std::string>& isa)
        : isa_(choose_instruction_set(isa)), pool_(num_threads), sampler_(*isa_.sampling, pool_) {
        parse(spec);
        register_weights(spec);
        const KvType type = kv_type_named(kv_type.c_str());
        for (const Layer& layer : model_.layers) {
            require(layer.head_dim % kv_head_dim_step(type) == 0, "head_dim " + std::to_string(layer.head_dim) +
                                                                      " is not a multiple of " +
                                                                      std::to_string(kv_head_dim_step(type)));
        }
        kv_cache_ = std::make_unique<KvCache>(model_, type);
        executor_ = std::make_unique<Executor>(model_, *kv_cache_, pool_, isa_);
    }

    // Takes memory for a matrix; its rows come by pack_rows.
    void allocate_matrix(const std::string& name, int format, int rows, int cols) {
        require(is_supported(format), "tensor type " + std::to_string(format) + " is not supported");
        PackedMatrix& matrix = *find(matrices_, name);
        matrix.format = static_cast<WeightFormat>(format);
        require(rows > 0 && cols > 0 && cols % source_block_size(matrix.format) == 0,
                name + ": rows of " + std::to_string(cols) + " columns are not whole blocks");
        matrix.rows = rows;
        matrix.cols = cols;
        matrix.panel_bytes = packed_panel_bytes(matrix.format, cols);
        matrix.data = model_.arena.allocate(matrix.bytes());
        packed_rows_[name] = 0;
    }

    // Packs the next rows of a matrix, whole panels except at its end; false where one holds a scale or weight that is
    // not finite.
    bool pack_rows(const std::string& name, const Matrix<uint8_t>& data) {
        PackedMatrix& matrix = *find(matrices_, name);
        int& first = packed_rows_[name];
        const int64_t last = first + static_cast<int64_t>(data.shape(0));
        require(matrix.data != nullptr, name + " has no memory yet");
        require(last <= matrix.rows && (last % kPanelRows == 0 || last == matrix.rows) &&
                    data.shape(1) == source_row_bytes(matrix.format, matrix.cols),
                name + ": the data does not have the size of its shape");
        PackedMatrix part = matrix;
        part.rows = static_cast<int>(last) - first;
        part.data += static_cast<size_t>(first / kPanelRows) * matrix.panel_bytes;
        std::atomic<bool> finite{true};
        const uint8_t* source = data.data();
        auto work = [&](int thread) {
            pool_.parallel_for(thread, part.panels(), 8, [&](int begin, int end) {
                if (!pack_panels(part, source, begin, end)) finite = false;
            });
        };
        nb::gil_scoped_release release;
        pool_.run(work);
        first = static_cast<int>(last);
        return finite;
    }

    void set_vector(const std::string& name, const Vector<float>& values) {
        std::vector<float>& vector = *find(vectors_, name);
        vector.assign(values.data(), values.data() + values.shape(0));
    }

    // Checks that every weight has come, with shapes that fit.
    void finish() {
        for (const auto& [name, matrix] : matrices_) {
            const auto [rows, cols] = shapes_.at(name);
            require(matrix->data != nullptr, name + " is missing");
            require(matrix->rows == rows && matrix->cols == cols, name + " has the wrong shape");
            require(packed_rows_.at(name) == rows, name + " is not whole");
        }
        for (const auto& [name, vector] : vectors_) {
            require(static_cast<int>(vector->size()) == shapes_.at(name).first, name + " is missing or of wrong size");
        }
    }

    size_t block_bytes() const { return kv_cache_->block_bytes(); }

    // Bytes of packed weights that one decode step reads.
    size_t weight_bytes() const {
        size_t bytes = model_.output_matrix().bytes();
        for (const Layer& layer : model_.layers) {
            for (const PackedMatrix* matrix : {&layer.q_proj, &layer.k_proj, &layer.v_proj, &layer.o_proj,
                                               &layer.gate_proj, &layer.up_proj, &layer.down_proj}) {
                bytes += matrix->bytes();
            }
        }
        return bytes;
    }

    std::string isa() const { return isa_.name; }
    int num_threads() const { return pool_.num_threads(); }

    nb::tuple sample(const LogitsArray& logits, const RowBytes& rows, const nb::object& tokens, const nb::object& bias,
                     const nb::object& masks, const nb::object& dry_breakers) {
        return sample_batch(sampler_, logits, rows, {tokens, bias, masks, dry_breakers});
    }

    void allocate_kv_cache(int num_blocks) {
        require(num_blocks > 0, "num_blocks must be positive");
        kv_cache_->allocate(num_blocks);
    }

    void copy_blocks(const Matrix<int32_t>& pairs) {
        require(pairs.shape(1) == 2, "pairs must have two columns");
        for (size_t i = 0; i < 2 * pairs.shape(0); ++i) require_block(pairs.data()[i]);
        for (size_t i = 0; i < pairs.shape(0); ++i) kv_cache_->copy(pairs.data()[2 * i], pairs.data()[2 * i + 1]);
    }

    // Copies KV blocks out as they lie in memory; a row of `data` each.
    void read_blocks(const Vector<int32_t>& blocks, MutableMatrix<uint8_t>& data) const {
        require_rows(blocks, data);
        uint8_t* out = data.data();
        nb::gil_scoped_release release;
        for (size_t i = 0; i < blocks.shape(0); ++i) kv_cache_->read(blocks.data()[i], out + i * block_bytes());
    }

    // Copies in what `read_blocks` gave.
    void write_blocks(const Vector<int32_t>& blocks, const Matrix<uint8_t>& data) {
        require_rows(blocks, data);
        nb::gil_scoped_release release;
        for (size_t i = 0; i < blocks.shape(0); ++i) {
            kv_cache_->write(blocks.data()[i], data.data() + i * block_bytes());
        }
    }

    bool forward(const Vector<int32_t>& input_ids, const Vector<int32_t>& positions, const Vector<int32_t>& cu_seqlens,
                 const Vector<int32_t>& kv_lens, const BlockTables& block_tables, const Vector<int32_t>& logits_rows,
                 MutableMatrix<float>& logits, const std::optional<Vector<int32_t>>& layers, nb::handle capture) {
        Batch batch;
        batch.num_tokens = static_cast<int>(input_ids.shape(0));
        batch.num_seqs = static_cast<int>(kv_lens.shape(0));
        batch.num_logits = static_cast<int>(logits_rows.shape(0));
        batch.input_ids = input_ids.data();
        batch.positions = positions.data();
        batch.cu_seqlens = cu_seqlens.data();
        batch.kv_lens = kv_lens.data();
        batch.block_tables = block_tables.data();
        batch.group_stride = block_tables.stride(0);
        batch.seq_stride = block_tables.stride(1);
        batch.logits_rows = logits_rows.data();
        require(static_cast<int>(positions.shape(0)) == batch.num_tokens &&
                    static_cast<int>(cu_seqlens.shape(0)) == batch.num_seqs + 1 &&
                    static_cast<int>(block_tables.shape(1)) == batch.num_seqs,
                "the arrays of the batch do not fit together");
        require(block_tables.shape(0) == model_.kv_windows.size() && block_tables.stride(2) == 1,
                "block_tables does not have a table with contiguous rows for each KV group");
        require(static_cast<int>(logits.shape(0)) == batch.num_logits &&
                    static_cast<int>(logits.shape(1)) == model_.vocab_size,
                "logits has the wrong shape");
        if (layers) {
            batch.layers = layers->data();
            batch.num_layers = static_cast<int>(layers->shape(0));
            require(capture.is_none(), "a batch that leaves out layers captures nothing");
        }
        check(batch, static_cast<int>(block_tables.shape(2)));
        StepCapture wanted;
        if (!capture.is_none()) {
            wanted = parse_capture(capture, model_, batch);
            batch.capture = &wanted;
        }
        float* out = logits.data();
        nb::gil_scoped_release release;
        return executor_->forward(batch, out);
    }

    bool project(const Matrix<float>& hidden, bool normalize, MutableMatrix<float>& logits) {
        require(static_cast<int>(hidden.shape(1)) == model_.hidden_size, "hidden has the wrong shape");
        require(logits.shape(0) == hidden.shape(0) && static_cast<int>(logits.shape(1)) == model_.vocab_size,
                "logits has the wrong shape");
        const float* in = hidden.data();
        const int rows = static_cast<int>(hidden.shape(0));
        float* out = logits.data();
        nb::gil_scoped_release release;
        return executor_->project_hidden(in, rows, normalize, out);
    }

  private:
    template <class T>
    static T* find(const std::map<std::string, T*>& weights, const std::string& name) {
        const auto found = weights.find(name);
        require(found != weights.end(), "the model has no weight " + name);
        return found->second;
    }

    void require_block(int32_t block) const {
        if (block >= 0 && block < kv_cache_->num_blocks()) return;  // a message for every block would take longest
        require(false, "KV block " + std::to_string(block) + " does not exist; there are " +
                           std::to_string(kv_cache_->num_blocks()));
    }

    template <class Rows>
    void require_rows(const Vector<int32_t>& blocks, const Rows& data) const {
        require(data.shape(0) == blocks.shape(0) && data.shape(1) == block_bytes(),
                "data must have a row of " + std::to_string(block_bytes()) + " bytes for each block");
        for (size_t i = 0; i < blocks.shape(0); ++i) require_block(blocks.data()[i]);
    }

    void check(const Batch& batch, int max_blocks) const {
        require(
            batch.num_tokens > 0 && batch.cu_seqlens[0] == 0 && batch.cu_seqlens[batch.num_seqs] == batch.num_tokens,
            "cu_seqlens does not cover the tokens");
        for (int seq = 0; seq < batch.num_seqs; ++seq) {
            const int begin = batch.cu_seqlens[seq];
            const int end = batch.cu_seqlens[seq + 1];
            require(begin < end, "every sequence of a batch has at least one new token");
            require(end <= batch.num_tokens, "cu_seqlens does not cover the tokens");
            const int first = batch.kv_lens[seq] - (end - begin);
            require(first >= 0 && (batch.kv_lens[seq] - 1) / kKvBlockSize < max_blocks,
                    "kv_lens does not fit the new tokens and the block table");
            for (int token = begin; token < end; ++token) {
                require(batch.positions[token] == first + token - begin, "positions do not end at kv_lens");
                require(batch.input_ids[token] >= 0 && batch.input_ids[token] < model_.vocab_size,
                        "token id " + std::to_string(batch.input_ids[token]) + " is outside the vocabulary of " +
                            std::to_string(model_.vocab_size));
            }
            for (size_t group = 0; group < model_.kv_windows.size(); ++group) {
                const int window = model_.kv_windows[group];
                const int first_seen = window == 0 ? 0 : std::max(0, first - window + 1);
                const int32_t* table = batch.block_table(static_cast<int>(group), seq);
                for (int block = first_seen / kKvBlockSize; block <= (batch.kv_lens[seq] - 1) / kKvBlockSize; ++block) {
                    require_block(table[block]);
                }
            }
        }
        if (batch.layers != nullptr) check_layers(batch);
        for (int i = 0; i < batch.num_logits; ++i) {
            require(batch.logits_rows[i] >= 0 && batch.logits_rows[i] < batch.num_tokens,
                    "logits_rows names a token that is not in the batch");
        }
    }

    void check_layers(const Batch& batch) const {
        require(batch.num_layers > 0, "layers is empty: at least one must run");
        for (int i = 0; i < batch.num_layers; ++i) {
            const int layer = batch.layers[i];
            require(
                layer >= 0 && layer < static_cast<int>(model_.layers.size()) && (i == 0 || batch.layers[i - 1] < layer),
                "layers must rise, each from 0 to " + std::to_string(model_.layers.size() - 1));
        }
    }

    void parse(const nb::dict& spec) {
        model_.vocab_size = get<int>(spec, "vocab_size");
        model_.hidden_size = get<int>(spec, "hidden_size");
        model_.embedding_scale = get<float>(spec, "embedding_scale");
        model_.final_norm.eps = get<float>(spec, "final_norm_eps");
        for (nb::handle item : get<nb::list>(spec, "ropes")) {
            const nb::dict fields = nb::cast<nb::dict>(item);
            RopeTable rope;
            rope.inv_freq = get<std::vector<float>>(fields, "inv_freq");
            rope.attention_factor = get<float>(fields, "attention_factor");
            model_.ropes.push_back(std::move(rope));
        }
        model_.kv_windows = get<std::vector<int>>(spec, "kv_windows");
        const nb::list layers = get<nb::list>(spec, "layers");
        model_.layers.resize(nb::len(layers));
        for (size_t i = 0; i < model_.layers.size(); ++i) {
            const nb::dict fields = nb::cast<nb::dict>(layers[i]);
            Layer& layer = model_.layers[i];
            layer.num_heads = get<int>(fields, "num_attention_heads");
            layer.num_kv_heads = get<int>(fields, "num_key_value_heads");
            layer.head_dim = get<int>(fields, "head_dim");
            require(layer.head_dim > 0 && layer.head_dim <= kMaxHeadDim && layer.head_dim % 2 == 0,
                    "head_dim " + std::to_string(layer.head_dim) + " is not even and at most " +
                        std::to_string(kMaxHeadDim));
            layer.scale = get<float>(fields, "scale");
            layer.sliding_window = get<int>(fields, "sliding_window");
            layer.rope = get<int>(fields, "rope");
            layer.kv_group = get<int>(fields, "kv_group");
            layer.activation =
                get<std::string>(fields, "activation") == "silu" ? ActivationKind::kSilu : ActivationKind::kGeluTanh;
            layer.attention_norm.eps = get<float>(fields, "attention_norm_eps");
            layer.q_norm.eps = layer.k_norm.eps = get<float>(fields, "qk_norm_eps");
            layer.post_attention_norm.eps = get<float>(fields, "post_attention_norm_eps");
            layer.mlp_norm.eps = get<float>(fields, "mlp_norm_eps");
            layer.post_mlp_norm.eps = get<float>(fields, "post_mlp_norm_eps");
        }
    }

    // Ties every name of models/spec.py tensor_shapes to its place.
    void register_weights(const nb::dict& spec) {
        for (auto [key, value] : get<nb::dict>(spec, "shapes")) {
            const std::string name = nb::cast<std::string>(key);
            const nb::tuple shape = nb::cast<nb::tuple>(value);
            shapes_[name] = {nb::cast<int>(shape[0]), shape.size() > 1 ? nb::cast<int>(shape[1]) : 0};
        }
        add("embed_tokens.weight", model_.embed_tokens);
        add("lm_head.weight", model_.lm_head);
        add("final_norm.weight", model_.final_norm.weight);
        for (size_t i = 0; i < model_.layers.size(); ++i) {
            const std::string prefix = "layers." + std::to_string(i) + ".";
            Layer& layer = model_.layers[i];
            add(prefix + "attention.q_proj.weight", layer.q_proj);
            add(prefix + "attention.k_proj.weight", layer.k_proj);
            add(prefix + "attention.v_proj.weight", layer.v_proj);
            add(prefix + "attention.o_proj.weight", layer.o_proj);
            add(prefix + "mlp.gate_proj.weight", layer.gate_proj);
            add(prefix + "mlp.up_proj.weight", layer.up_proj);
            add(prefix + "mlp.down_proj.weight", layer.down_proj);
            add(prefix + "attention.q_proj.bias", layer.q_bias);
            add(prefix + "attention.k_proj.bias", layer.k_bias);
            add(prefix + "attention.v_proj.bias", layer.v_bias);
            add(prefix + "attention_norm.weight", layer.attention_norm.weight);
            add(prefix + "attention.q_norm.weight", layer.q_norm.weight);
            add(prefix + "attention.k_norm.weight", layer.k_norm.weight);
            add(prefix + "post_attention_norm.weight", layer.post_attention_norm.weight);
            add(prefix + "mlp_norm.weight", layer.mlp_norm.weight);
            add(prefix + "post_mlp_norm.weight", layer.post_mlp_norm.weight);
        }
        for (const auto& [name, shape] : shapes_) {
            require(matrices_.count(name) + vectors_.count(name) == 1, "the native core has no place for " + name);
        }
    }

    void add(const std::string& name, PackedMatrix& matrix) {
        if (shapes_.count(name)) matrices_[name] = &matrix;
    }
    void add(const std::string& name, std::vector<float>& vector) {
        if (shapes_.count(name)) vectors_[name] = &vector;
    }

    const InstructionSet& isa_;
    ThreadPool pool_;
    BatchSampler sampler_;
    Model model_;
    std::map<std::string, std::pair<int, int>> shapes_;
    std::map<std::string, PackedMatrix*> matrices_;
    std::map<std::string, int> packed_rows_;
    std::map<std::string, std::vector<float>*> vectors_;
    std::unique_ptr<KvCache> kv_cache_;
    std::unique_ptr<Executor> executor_;
};

std::vector<std::string> instruction_sets() {
    std::vector<std::string> names;
    for (const InstructionSet& set : available_instruction_sets()) names.push_back(set.name);
    return names;
}

}  // namespace

}  // namespace pellucid

NB_MODULE(_native, module) {
    using pellucid::NativeModel;
    // A model that a daemon thread or a module still holds when Python ends is no leak to tell a user of.
    nb::set_leak_warnings(false);
    nb::class_<NativeModel>(module, "Model")
        .def(nb::init<const nb::dict&, int, const std::string&, const std::optional<std::string>&>(), nb::arg("spec"),
             nb::arg("threads"), nb::arg("kv_cache_dtype"), nb::arg("isa") = nb::none())
        .def("allocate_matrix", &NativeModel::allocate_matrix)
        .def("pack_rows", &NativeModel::pack_rows)
        .def("set_vector", &NativeModel::set_vector)
        .def("finish", &NativeModel::finish)
        .def("allocate_kv_cache", &NativeModel::allocate_kv_cache)
        .def("copy_blocks", &NativeModel::copy_blocks)
        .def("read_blocks", &NativeModel::read_blocks, nb::arg("blocks"), nb::arg("data").noconvert())
        .def("write_blocks", &NativeModel::write_blocks, nb::arg("blocks"), nb::arg("data").noconvert())
        .def("sample", &NativeModel::sample, nb::arg("logits").noconvert(), nb::arg("rows"), nb::arg("tokens").none(),
             nb::arg("bias").none(), nb::arg("masks").none(), nb::arg("dry_breakers").none())
        .def("forward", &NativeModel::forward, nb::arg("input_ids"), nb::arg("positions"), nb::arg("cu_seqlens"),
             nb::arg("kv_lens"), nb::arg("block_tables"), nb::arg("logits_rows"), nb::arg("logits"),
             nb::arg("layers").none(), nb::arg("capture").none())
        .def("project", &NativeModel::project, nb::arg("hidden").noconvert(), nb::arg("normalize"),
             nb::arg("logits").noconvert())
        .def_prop_ro("block_bytes", &NativeModel::block_bytes)
        .def_prop_ro("weight_bytes", &NativeModel::weight_bytes)
        .def_prop_ro("num_threads", &NativeModel::num_threads)
        .def_prop_ro("isa", &NativeModel::isa);
    module.attr("MAX_HEAD_DIM") = pellucid::kMaxHeadDim;
    module.def("instruction_sets", &pellucid::instruction_sets,
               "Instruction sets of this machine that the core has kernels for, the best first.");
    module.def("cpu_features", &pellucid::cpu_features, "Processor features that the choice of kernels rests on.");
    pellucid::bind_kernels(module);
    pellucid::bind_matmul(module);
    pellucid::bind_peaks(module);
    pellucid::bind_sampling(module);
}
