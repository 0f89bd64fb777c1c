// The part of modstruct._C that computes on the CPU. Python hands over addresses, sizes and the number of threads; it has
// checked dtype, device and layout.
#include "bindings_cpu.h"

#include <pybind11/stl.h>

#include "pairwise_cpu.h"

namespace py = pybind11;

namespace {

using Address = std::uintptr_t;

template <typename Number>
Number* pointer(Address address) {
    return reinterpret_cast<Number*>(address);
}

template <typename Number = float>
Number* needed(Address address, const char* name) {
    if (address == 0) {
        throw py::value_error(std::string(name) + " must be an address, not 0");
    }
    return pointer<Number>(address);
}

modstruct::cpu::Pairs pairs(Address x, std::int64_t rows, Address y, std::int64_t columns, std::int64_t dimension) {
    if (rows < 1 || columns < 1 || dimension < 1) {
        throw py::value_error("rows, columns and dimension must be at least 1");
    }
    return {needed<const float>(x, "x"), rows, needed<const float>(y, "y"), columns, dimension};
}

modstruct::cpu::GeometricRows geometric_rows(Address a, Address b, std::int64_t rows, std::int64_t dimension, Address centers) {
    const auto p = pairs(a, rows, b, rows, dimension);
    return {p.x, p.y, rows, dimension, needed<const float>(centers, "centers")};
}

std::int64_t checked_first(std::int64_t first, const modstruct::cpu::Pairs& pairs) {
    if (first < 0 || first + pairs.rows > pairs.columns) {
        throw py::value_error("first must leave a column for each row's positive");
    }
    return first;
}

template <typename Problem>
void run(void (*kernel)(const Problem&, const modstruct::cpu::Choice&), const Problem& problem, int threads,
         const std::string& instruction_set) {
    if (threads < 1) {
        throw py::value_error("threads must be at least 1");
    }
    py::gil_scoped_release release;
    kernel(problem, {instruction_set, threads});
}

}  // namespace

void bind_cpu(py::module_& module) {
    // pairwise_cpu.h says what each computes. Arrays are float32 unless it says otherwise.
    module.def(
        "cpu_contrastive_statistics",
        [](Address x, std::int64_t rows, Address y, std::int64_t columns, std::int64_t dimension, Address scale,
           std::int64_t first, Address row_lse, Address column_lse, Address positive, int threads,
           const std::string& instruction_set) {
            const auto p = pairs(x, rows, y, columns, dimension);
            run<modstruct::cpu::ContrastiveStatistics>(
                modstruct::cpu::contrastive_statistics,
                {p, needed<const float>(scale, "scale"), checked_first(first, p), needed(row_lse, "row_lse"),
                 needed(column_lse, "column_lse"), needed(positive, "positive")},
                threads, instruction_set);
        },
        py::kw_only(), py::arg("x"), py::arg("rows"), py::arg("y"), py::arg("columns"), py::arg("dimension"),
        py::arg("scale"), py::arg("first"), py::arg("row_lse"), py::arg("column_lse"), py::arg("positive"),
        py::arg("threads"), py::arg("instruction_set"));

    module.def(
        "cpu_contrastive_pulls",
        [](Address x, std::int64_t rows, Address y, std::int64_t columns, std::int64_t dimension, Address scale,
           std::int64_t first, Address row_lse, Address column_lse, Address row_weight, Address column_weight,
           Address positive_weight, Address x_pull, Address y_pull, int threads, const std::string& instruction_set) {
            const auto p = pairs(x, rows, y, columns, dimension);
            run<modstruct::cpu::ContrastivePulls>(
                modstruct::cpu::contrastive_pulls,
                {p, needed<const float>(scale, "scale"), checked_first(first, p), needed<const float>(row_lse, "row_lse"),
                 needed<const float>(column_lse, "column_lse"), needed<const float>(row_weight, "row_weight"),
                 needed<const float>(column_weight, "column_weight"),
                 needed<const float>(positive_weight, "positive_weight"), needed(x_pull, "x_pull"),
                 needed(y_pull, "y_pull")},
                threads, instruction_set);
        },
        py::kw_only(), py::arg("x"), py::arg("rows"), py::arg("y"), py::arg("columns"), py::arg("dimension"),
        py::arg("scale"), py::arg("first"), py::arg("row_lse"), py::arg("column_lse"), py::arg("row_weight"),
        py::arg("column_weight"), py::arg("positive_weight"), py::arg("x_pull"), py::arg("y_pull"), py::arg("threads"),
        py::arg("instruction_set"));

    module.def(
        "cpu_row_contrast",
        [](Address x, std::int64_t rows, Address y, std::int64_t columns, std::int64_t dimension, Address momentum,
           Address scale, std::int64_t first, double alpha, Address losses, Address x_pull, Address y_pull, int threads,
           const std::string& instruction_set) {
            const auto p = pairs(x, rows, y, columns, dimension);
            if (y_pull != 0 && x_pull == 0) {
                throw py::value_error("y_pull must not be given without x_pull");
            }
            run<modstruct::cpu::RowContrast>(
                modstruct::cpu::row_contrast,
                {p, pointer<const float>(momentum), needed<const float>(scale, "scale"), checked_first(first, p),
                 static_cast<float>(alpha), needed(losses, "losses"), pointer<float>(x_pull), pointer<float>(y_pull)},
                threads, instruction_set);
        },
        py::kw_only(), py::arg("x"), py::arg("rows"), py::arg("y"), py::arg("columns"), py::arg("dimension"),
        py::arg("momentum"), py::arg("scale"), py::arg("first"), py::arg("alpha"), py::arg("losses"), py::arg("x_pull"),
        py::arg("y_pull"), py::arg("threads"), py::arg("instruction_set"));

    module.def(
        "cpu_gaussian_potential",
        [](Address x, std::int64_t rows, Address y, std::int64_t columns, std::int64_t dimension, bool symmetric,
           double t, Address total, Address x_pull, Address y_pull, int threads, const std::string& instruction_set) {
            if ((y_pull != 0) != (x_pull != 0 && !symmetric)) {
                throw py::value_error("y_pull must be given with x_pull, and not where the problem is symmetric");
            }
            run<modstruct::cpu::GaussianPotential>(
                modstruct::cpu::gaussian_potential,
                {pairs(x, rows, y, columns, dimension), symmetric, static_cast<float>(t), needed<double>(total, "total"),
                 pointer<float>(x_pull), pointer<float>(y_pull)},
                threads, instruction_set);
        },
        py::kw_only(), py::arg("x"), py::arg("rows"), py::arg("y"), py::arg("columns"), py::arg("dimension"),
        py::arg("symmetric"), py::arg("t"), py::arg("total"), py::arg("x_pull"), py::arg("y_pull"), py::arg("threads"),
        py::arg("instruction_set"));

    module.def(
        "cpu_geometric_products",
        [](Address a, Address b, std::int64_t rows, std::int64_t dimension, Address centers, Address plus, Address minus, int threads,
           const std::string& instruction_set) {
            run<modstruct::cpu::GeometricProducts>(
                modstruct::cpu::geometric_products,
                {geometric_rows(a, b, rows, dimension, centers), needed(plus, "plus"), needed(minus, "minus")}, threads,
                instruction_set);
        },
        py::kw_only(), py::arg("a"), py::arg("b"), py::arg("rows"), py::arg("dimension"), py::arg("centers"), py::arg("plus"),
        py::arg("minus"), py::arg("threads"), py::arg("instruction_set"));

    module.def(
        "cpu_geometric_pulls",
        [](Address a, Address b, std::int64_t rows, std::int64_t dimension, Address centers, Address plus_weights, Address minus_weights,
           Address a_pull, Address b_pull, int threads, const std::string& instruction_set) {
            run<modstruct::cpu::GeometricPulls>(
                modstruct::cpu::geometric_pulls,
                {geometric_rows(a, b, rows, dimension, centers), needed<const float>(plus_weights, "plus_weights"),
                 needed<const float>(minus_weights, "minus_weights"), needed(a_pull, "a_pull"),
                 needed(b_pull, "b_pull")},
                threads, instruction_set);
        },
        py::kw_only(), py::arg("a"), py::arg("b"), py::arg("rows"), py::arg("dimension"), py::arg("centers"), py::arg("plus_weights"),
        py::arg("minus_weights"), py::arg("a_pull"), py::arg("b_pull"), py::arg("threads"), py::arg("instruction_set"));

    module.def(
        "cpu_nearest_counts",
        [](Address x, std::int64_t rows, Address y, std::int64_t columns, std::int64_t dimension, Address query,
           Address item, std::int64_t count, Address above, Address ties, int threads,
           const std::string& instruction_set) {
            if (count < 1) {
                throw py::value_error("count must be at least 1");
            }
            run<modstruct::cpu::NearestCounts>(
                modstruct::cpu::nearest_counts,
                {pairs(x, rows, y, columns, dimension), needed<const std::int64_t>(query, "query"),
                 needed<const std::int64_t>(item, "item"), count, needed<std::int64_t>(above, "above"),
                 needed<std::int64_t>(ties, "ties")},
                threads, instruction_set);
        },
        py::kw_only(), py::arg("x"), py::arg("rows"), py::arg("y"), py::arg("columns"), py::arg("dimension"),
        py::arg("query"), py::arg("item"), py::arg("count"), py::arg("above"), py::arg("ties"), py::arg("threads"),
        py::arg("instruction_set"));
}
