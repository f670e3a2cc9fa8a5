// Reading a node, and refusing what kernels could not compute.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <initializer_list>
#include <string>
#include <vector>

#include "ort.h"

namespace tokopt {

using Shape = std::vector<int64_t>;

inline std::string text(const Shape& shape) {
    std::string joined;
    for (int64_t size : shape) joined += (joined.empty() ? "" : ", ") + std::to_string(size);
    return "[" + joined + "]";
}

// A tensor that is given to a node; without data where an optional input is left out.
struct Tensor {
    const char* data = nullptr;
    int element = 0;
    Shape shape;
};

inline Tensor tensor(const Api& api, const OrtValue* value) {
    if (!value) return {};
    OrtShapeInfo* info = api.shape_info(value);
    Tensor found;
    found.element = api.element(info);
    found.shape.resize(api.rank(info));
    api.dimensions(info, found.shape.data(), found.shape.size());
    api.release(info);
    found.data = static_cast<const char*>(api.data(value));
    return found;
}

// An input of a call, without memory of its own; no sizes are known where it has more axes than are asked for.
struct Argument {
    static constexpr size_t MOST_AXES = 4;

    bool is(std::initializer_list<int64_t> shape) const {
        return rank == shape.size() && std::equal(shape.begin(), shape.end(), sizes);
    }

    const char* data = nullptr;
    size_t rank = 0;
    int64_t sizes[MOST_AXES] = {};
};

inline Argument argument(const Api& api, const OrtValue* value) {
    Argument found;
    OrtShapeInfo* info = api.shape_info(value);
    found.rank = api.rank(info);
    if (found.rank <= Argument::MOST_AXES) api.dimensions(info, found.sizes, found.rank);
    api.release(info);
    found.data = static_cast<const char*>(api.data(value));
    return found;
}

inline std::string text(const Argument& given) {
    const bool known = given.rank <= Argument::MOST_AXES;
    return known ? text(Shape(given.sizes, given.sizes + given.rank)) : std::to_string(given.rank) + " axes";
}

// Numbers of a call, at any address.
template <class Number>
struct Numbers {
    const char* data;

    Number operator[](size_t i) const {
        Number value;
        std::memcpy(&value, data + i * sizeof value, sizeof value);
        return value;
    }
};

class Node {
  public:
    Node(const Api& api, const OrtKernelInfo* info, const char* op)
        : api(api), info(info), where("tokopt.cpu::" + std::string(op) + " '" + api.node_name(info) + "': ") {}

    [[noreturn]] void refuse(const std::string& what) const { throw Refused(where + what + "."); }

    int64_t integer(const char* name) const {
        int64_t value = 0;
        if (!api.integer(info, name, &value)) refuse("attribute " + std::string(name) + " is missing");
        return value;
    }
    float number(const char* name) const {
        float value = 0;
        if (!api.number(info, name, &value)) refuse("attribute " + std::string(name) + " is missing");
        return value;
    }
    bool has(size_t place) const { return place < api.inputs(info) && !api.input_name(info, place).empty(); }

    // Without data where the input is left out.
    Tensor constant(size_t place, const char* name) const {
        if (!has(place)) return {};
        const OrtValue* value = api.constant(info, place);
        if (!value) refuse(std::string(name) + " must be a constant");
        return tensor(api, value);
    }

    const std::string& says() const { return where; }

  private:
    const Api& api;
    const OrtKernelInfo* info;
    const std::string where;
};

}  // namespace tokopt
