// The CUDA kernels in modstruct._C, for modstruct/pairwise/cuda_kernels.py. Addresses are of device memory, 0 where
// pairwise_cuda.h allows null.
#include "bindings_cuda.h"

#include <iterator>
#include <sstream>

#include "../arguments.h"
#include "pairwise_cuda.h"

namespace py = pybind11;
using namespace modstruct::cuda;

namespace {

Precision precision(Arguments& a) {
    const auto name = a.take<std::string>("precision");
    if (name != "float32" && name != "tf32" && name != "bf16") {
        throw py::value_error("precision = '" + name + "': must be float32, tf32 or bf16");
    }
    return name == "float32" ? Precision::float32 : name == "tf32" ? Precision::tf32 : Precision::bf16;
}

std::int64_t row_bytes(Arguments& a) {
    const auto value = a.count("row_bytes");
    if (value % DEPTH_BYTES != 0) {
        throw py::value_error("row_bytes = " + std::to_string(value) + ": must be a multiple of 64");
    }
    return value;
}

Panel panel(Arguments& a) {
    return {a.address<const void>("rows"), a.count("row_count"),           a.address<const void>("columns"),
            a.count("column_count"),       row_bytes(a),                   a.take<std::int64_t>("first"),
            a.address<const float>("scale")};
}

// Queues read(arguments) and releases Python's lock meanwhile.
template <class Problem, class Read>
void define(py::module_& module, const char* name, void (*queue)(const Problem&, Precision, void*), Read read) {
    module.def(name, [queue, read](const py::kwargs& given) {
        Arguments arguments(given);
        const Problem problem = read(arguments);
        const Precision kind = precision(arguments);
        void* stream = arguments.address<void>("stream");
        arguments.all_taken();
        py::gil_scoped_release release;
        queue(problem, kind, stream);
    });
}

ContrastiveStatistics read_contrastive_statistics(Arguments& a) {
    return {panel(a),
            a.address<float>("row_lse"),
            a.address<float>("positive"),
            a.address<float>("column_lse"),
            a.address<float>("row_partials"),
            a.address<float>("column_partials"),
            a.address<float>("column_running"),
            a.take<bool>("first_panel"),
            a.take<bool>("last_panel")};
}

ContrastiveWeights read_contrastive_weights(Arguments& a) {
    return {panel(a),
            a.address<const float>("row_lse"),
            a.address<const float>("row_weight"),
            a.address<const float>("column_lse"),
            a.address<const float>("column_weight"),
            a.address<void>("weights"),
            a.count("weights_stride")};
}

MomentumStatistics read_momentum_statistics(Arguments& a) {
    return {panel(a),
            a.address<const void>("momentum_rows"),
            a.address<const float>("positive"),
            a.address<float>("row_lse"),
            a.address<float>("momentum_lse"),
            a.address<float>("gap"),
            a.address<float>("partials"),
            a.address<float>("momentum_partials")};
}

MomentumWeights read_momentum_weights(Arguments& a) {
    return {panel(a),
            a.address<const void>("momentum_rows"),
            a.address<const float>("row_lse"),
            a.address<const float>("row_weight"),
            a.address<const float>("momentum_lse"),
            a.address<const float>("momentum_weight"),
            a.address<void>("weights"),
            a.count("weights_stride")};
}

SigmoidWeights read_sigmoid_weights(Arguments& a) {
    return {panel(a),
            a.address<const float>("bias"),
            a.address<double>("totals"),
            a.address<void>("weights"),
            a.take<std::int64_t>("weights_stride"),
            a.address<double>("tile_sums")};
}

GaussianPanel read_gaussian_panel(Arguments& a) {
    return {panel(a),
            a.take<bool>("own"),
            a.address<const float>("row_norms"),
            a.address<const float>("column_norms"),
            a.take<float>("t"),
            a.address<double>("total"),
            a.address<double>("row_others"),
            a.address<double>("column_others"),
            a.address<void>("weights"),
            a.take<std::int64_t>("weights_stride"),
            a.address<double>("tile_sums"),
            a.address<float>("row_partials"),
            a.address<float>("column_partials")};
}

struct Norms {
    const void* rows;
    std::int64_t count, row_bytes;
    float* norms;
};
Norms read_norms(Arguments& a) {
    return {a.address<const void>("rows"), a.count("row_count"), row_bytes(a), a.address<float>("norms")};
}

PairScores read_pair_scores(Arguments& a) {
    return {a.address<const void>("rows"),
            a.address<const void>("columns"),
            row_bytes(a),
            a.address<const std::int64_t>("pair_query"),
            a.address<const std::int64_t>("pair_gallery"),
            a.count("pair_count"),
            a.address<float>("scores")};
}

NearestCounts read_nearest_counts(Arguments& a) {
    return {panel(a),
            a.address<const std::int64_t>("pair_offsets"),
            a.address<const std::int64_t>("pair_gallery"),
            a.address<const float>("scores"),
            a.address<std::int32_t>("above"),
            a.address<std::int32_t>("ties")};
}

}  // namespace

void bind_cuda(py::module_& module) {
    module.def(
        "cuda_sizes",
        [] {
            py::dict sizes;
            sizes["tile_rows"] = TILE_ROWS;
            sizes["tile_columns"] = TILE_COLUMNS;
            sizes["narrow_tile_columns"] = NARROW_TILE_COLUMNS;
            sizes["depth_bytes"] = DEPTH_BYTES;
            sizes["store_bytes"] = STORE_BYTES;
            return sizes;
        },
        "What workspace and padding are measured in (csrc/cuda/pairwise_cuda.h).");
    define(module, "cuda_contrastive_statistics", contrastive_statistics, read_contrastive_statistics);
    define(module, "cuda_contrastive_weights", contrastive_weights, read_contrastive_weights);
    define(module, "cuda_momentum_statistics", momentum_statistics, read_momentum_statistics);
    define(module, "cuda_momentum_weights", momentum_weights, read_momentum_weights);
    define(module, "cuda_sigmoid_weights", sigmoid_weights, read_sigmoid_weights);
    define(module, "cuda_gaussian_potential", gaussian_potential, read_gaussian_panel);
    define(module, "cuda_pair_scores", pair_scores, read_pair_scores);
    define(module, "cuda_nearest_counts", nearest_counts, read_nearest_counts);
    define<Norms>(
        module, "cuda_squared_norms",
        [](const Norms& n, Precision precision, void* stream) {
            squared_norms(n.rows, n.count, n.row_bytes, precision, n.norms, stream);
        },
        read_norms);
}

std::vector<std::string> cuda_architectures_built() {
    std::istringstream names(MODSTRUCT_CUDA_ARCHITECTURES);  // by setup.py, with blanks between
    return {std::istream_iterator<std::string>(names), {}};
}
