// Keyword arguments from Python as the fields of a problem; a missing or misspelt one is an error that names it.
// Addresses come as numbers. Python has checked dtype, device and layout.
#pragma once

#include <cstdint>
#include <string>

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

// Hidden, as everything of pybind11's is.
class __attribute__((visibility("hidden"))) Arguments {
   public:
    explicit Arguments(const pybind11::kwargs& given) : given_(given), left_(given.size()) {}

    template <class Value>
    Value take(const char* name) {
        if (!given_.contains(name)) {
            throw pybind11::type_error(std::string(name) + " is missing");
        }
        --left_;
        return given_[name].cast<Value>();
    }
    // May be null, given as 0.
    template <class Number>
    Number* address(const char* name) {
        return reinterpret_cast<Number*>(take<std::uintptr_t>(name));
    }
    template <class Number>
    Number* needed(const char* name) {
        Number* place = address<Number>(name);
        if (place == nullptr) {
            throw pybind11::value_error(std::string(name) + " must be an address, not 0");
        }
        return place;
    }
    std::int64_t count(const char* name) {
        const auto value = take<std::int64_t>(name);
        if (value < 1) {
            throw pybind11::value_error(std::string(name) + " = " + std::to_string(value) + ": must be at least 1");
        }
        return value;
    }
    void all_taken() const {
        if (left_ != 0) {
            throw pybind11::type_error("an argument is not known");
        }
    }

   private:
    const pybind11::kwargs& given_;
    std::size_t left_;
};
