// The CPU kernels in modstruct._C, for modstruct/pairwise/cpu_kernels.py. pairwise_cpu.h says what each computes.
#include "bindings_cpu.h"

#include "../arguments.h"
#include "pairwise_cpu.h"

namespace py = pybind11;
using namespace modstruct::cpu;

namespace {

Pairs pairs(Arguments& a) {
    return {a.needed<const float>("x"), a.count("rows"), a.needed<const float>("y"), a.count("columns"),
            a.count("dimension")};
}

GeometricRows geometric_rows(Arguments& a) {
    return {a.needed<const float>("a"), a.needed<const float>("b"), a.count("rows"), a.count("dimension"),
            a.needed<const float>("centers")};
}

std::int64_t first(Arguments& a, const Pairs& pairs) {
    const auto value = a.take<std::int64_t>("first");
    if (value < 0 || value + pairs.rows > pairs.columns) {
        throw py::value_error("first must leave a column for each row's positive");
    }
    return value;
}

// Gradients of both sides may be left out, or that of y alone.
template <class Problem>
Problem checked_grads(const Problem& problem) {
    if (problem.y_grad != nullptr && problem.x_grad == nullptr) {
        throw py::value_error("y_grad must not be given without x_grad");
    }
    return problem;
}

// Runs kernel(read(arguments)) and releases Python's lock meanwhile.
template <class Problem, class Read>
void define(py::module_& module, const char* name, void (*kernel)(const Problem&, const Choice&), Read read) {
    module.def(name, [kernel, read](const py::kwargs& given) {
        Arguments arguments(given);
        const Problem problem = read(arguments);
        const Choice choice = {arguments.take<std::string>("instruction_set"),
                               static_cast<int>(arguments.count("threads"))};
        arguments.all_taken();
        py::gil_scoped_release release;
        kernel(problem, choice);
    });
}

ContrastiveStatistics read_contrastive_statistics(Arguments& a) {
    const Pairs p = pairs(a);
    return {p, a.needed<const float>("scale"), first(a, p), a.needed<float>("row_lse"), a.needed<float>("column_lse"),
            a.needed<float>("positive"), a.address<float>("logits")};
}

ContrastiveGrad read_contrastive_grad(Arguments& a) {
    const Pairs p = pairs(a);
    return {p, a.needed<const float>("scale"), first(a, p), a.needed<const float>("row_values"),
            a.needed<const float>("column_values"), a.address<const float>("logits"), a.needed<float>("x_grad"),
            a.needed<float>("y_grad")};
}

RowContrast read_row_contrast(Arguments& a) {
    const Pairs p = pairs(a);
    return checked_grads<RowContrast>({p, a.address<const float>("momentum"), a.needed<const float>("scale"),
                                       first(a, p), a.take<float>("alpha"), a.needed<float>("losses"),
                                       a.address<float>("x_grad"), a.address<float>("y_grad")});
}

SigmoidContrast read_sigmoid_contrast(Arguments& a) {
    const Pairs p = pairs(a);
    return checked_grads<SigmoidContrast>({p, a.needed<const float>("affine"), first(a, p), a.needed<double>("totals"),
                                           a.address<float>("x_grad"), a.address<float>("y_grad")});
}

GaussianPotential read_gaussian_potential(Arguments& a) {
    const GaussianPotential problem = {pairs(a), a.take<bool>("symmetric"), a.take<float>("t"),
                                       a.needed<double>("total"), a.address<float>("x_grad"),
                                       a.address<float>("y_grad")};
    if ((problem.y_grad != nullptr) != (problem.x_grad != nullptr && !problem.symmetric)) {
        throw py::value_error("y_grad must be given with x_grad, and not where the problem is symmetric");
    }
    return problem;
}

GeometricProducts read_geometric_products(Arguments& a) { return {geometric_rows(a), a.needed<float>("products")}; }

GeometricGrad read_geometric_grad(Arguments& a) {
    return {geometric_rows(a), a.needed<const float>("weights"), a.needed<float>("a_grad"), a.needed<float>("b_grad")};
}

NearestCounts read_nearest_counts(Arguments& a) {
    return {pairs(a),         a.needed<const std::int64_t>("query"), a.needed<const std::int64_t>("item"),
            a.count("count"), a.needed<std::int64_t>("above"),       a.needed<std::int64_t>("ties")};
}

}  // namespace

void bind_cpu(py::module_& module) {
    module.def("cpu_kept_logits", kept_logits);
    define(module, "cpu_contrastive_statistics", contrastive_statistics, read_contrastive_statistics);
    define(module, "cpu_contrastive_grad", contrastive_grad, read_contrastive_grad);
    define(module, "cpu_row_contrast", row_contrast, read_row_contrast);
    define(module, "cpu_sigmoid_contrast", sigmoid_contrast, read_sigmoid_contrast);
    define(module, "cpu_gaussian_potential", gaussian_potential, read_gaussian_potential);
    define(module, "cpu_geometric_products", geometric_products, read_geometric_products);
    define(module, "cpu_geometric_grad", geometric_grad, read_geometric_grad);
    define(module, "cpu_nearest_counts", nearest_counts, read_nearest_counts);
}
