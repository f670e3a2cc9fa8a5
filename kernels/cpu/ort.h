// The part of ONNX Runtime's C interface that a custom op needs, without its headers.
//
// The interface is a table of function pointers that only grows, so an entry is known by its place; a kernel is a
// struct of callbacks. Both are stable across releases from VERSION on. Every call returns a status, which `Api`
// turns into an exception; `guarded` turns exceptions back into a status, so that none crosses into C.
#pragma once

#include <cstddef>
#include <cstdint>
#include <exception>
#include <new>
#include <string>
#include <utility>
#include <vector>

extern "C" {

struct OrtStatus;
struct OrtValue;
struct OrtKernelInfo;
struct OrtKernelContext;
struct OrtShapeInferContext;
struct OrtOpAttr;
struct OrtShapeInfo;  // ONNX Runtime's OrtTensorTypeAndShapeInfo
struct OrtTypeInfo;
struct OrtSessionOptions;
struct OrtCustomOpDomain;

struct OrtApiBase {
    void* const* (*GetApi)(uint32_t version);
    const char* (*GetVersionString)();
};

struct OrtCustomOp {
    uint32_t version;
    void* (*CreateKernel)(const OrtCustomOp*, void* const* api, const OrtKernelInfo*);
    const char* (*GetName)(const OrtCustomOp*);
    const char* (*GetExecutionProviderType)(const OrtCustomOp*);
    int (*GetInputType)(const OrtCustomOp*, size_t);
    size_t (*GetInputTypeCount)(const OrtCustomOp*);
    int (*GetOutputType)(const OrtCustomOp*, size_t);
    size_t (*GetOutputTypeCount)(const OrtCustomOp*);
    void (*KernelCompute)(void* kernel, OrtKernelContext*);
    void (*KernelDestroy)(void* kernel);
    int (*GetInputCharacteristic)(const OrtCustomOp*, size_t);
    int (*GetOutputCharacteristic)(const OrtCustomOp*, size_t);
    int (*GetInputMemoryType)(const OrtCustomOp*, size_t);
    int (*GetVariadicInputMinArity)(const OrtCustomOp*);
    int (*GetVariadicInputHomogeneity)(const OrtCustomOp*);
    int (*GetVariadicOutputMinArity)(const OrtCustomOp*);
    int (*GetVariadicOutputHomogeneity)(const OrtCustomOp*);
    OrtStatus* (*CreateKernelV2)(const OrtCustomOp*, void* const* api, const OrtKernelInfo*, void** kernel);
    OrtStatus* (*KernelComputeV2)(void* kernel, OrtKernelContext*);
    OrtStatus* (*InferOutputShapeFn)(const OrtCustomOp*, OrtShapeInferContext*);
    int (*GetStartVersion)(const OrtCustomOp*);
    int (*GetEndVersion)(const OrtCustomOp*);
    size_t (*GetMayInplace)(int** input, int** output);
    void (*ReleaseMayInplace)(int* input, int* output);
    size_t (*GetAliasMap)(int** input, int** output);
    void (*ReleaseAliasMap)(int* input, int* output);
};

}  // extern "C"

namespace tokopt {

constexpr uint32_t ORT_VERSION = 22;  // of the table and the struct above: ONNX Runtime 1.22

enum Element : int { ANY = 0, FLOAT = 1, UINT8 = 2, INT8 = 3, INT32 = 6, INT64 = 7, BOOL = 9, FLOAT16 = 10 };
enum Characteristic : int { REQUIRED = 0, OPTIONAL = 1 };

// A status of ONNX Runtime's own, on its way back to it.
struct Failed {
    OrtStatus* status;
};

// What is wrong with a node, in one sentence.
struct Refused : std::exception {
    explicit Refused(std::string sentence) : sentence(std::move(sentence)) {}
    const char* what() const noexcept override { return sentence.c_str(); }
    std::string sentence;
};

// The functions of ONNX Runtime's table that are used here.
class Api {
  public:
    explicit Api(void* const* table) : table(table) {}

    OrtStatus* status(int code, const char* text) const { return at<OrtStatus* (*)(int, const char*)>(0)(code, text); }
    void release(OrtStatus* status) const { at<void (*)(OrtStatus*)>(93)(status); }

    OrtCustomOpDomain* create_domain(const char* name) const {
        OrtCustomOpDomain* domain = nullptr;
        call(26, name, &domain);
        return domain;
    }
    void add(OrtCustomOpDomain* domain, const OrtCustomOp* op) const { call(27, domain, op); }
    void add(OrtSessionOptions* options, OrtCustomOpDomain* domain) const { call(28, options, domain); }

    const void* data(const OrtValue* value) const {
        void* data = nullptr;
        call(51, value, &data);
        return data;
    }
    OrtShapeInfo* shape_info(const OrtValue* value) const {
        OrtShapeInfo* info = nullptr;
        call(65, value, &info);
        return info;
    }
    void release(OrtShapeInfo* info) const { at<void (*)(OrtShapeInfo*)>(99)(info); }
    int element(const OrtShapeInfo* info) const {
        int type = 0;
        call(60, info, &type);
        return type;
    }
    size_t rank(const OrtShapeInfo* info) const {
        size_t rank = 0;
        call(61, info, &rank);
        return rank;
    }
    void dimensions(const OrtShapeInfo* info, int64_t* into, size_t rank) const { call(62, info, into, rank); }

    // "" for an axis that has a size, or no name.
    void symbols(const OrtShapeInfo* info, const char** into, size_t rank) const { call(63, info, into, rank); }
    const OrtShapeInfo* input_shape(OrtShapeInferContext* context, size_t place) const {
        OrtShapeInfo* info = nullptr;
        call(268, context, place, &info);
        return info;
    }
    bool has_attribute(const OrtShapeInferContext* context, const char* name) const {
        const OrtOpAttr* attribute = nullptr;
        using Get = OrtStatus* (*)(const OrtShapeInferContext*, const char*, const OrtOpAttr**);
        OrtStatus* failed = at<Get>(269)(context, name, &attribute);
        if (failed) release(failed);
        return !failed;
    }
    int64_t integer(OrtShapeInferContext* context, const char* name) const {
        constexpr int INTEGER = 1;
        const OrtOpAttr* attribute = nullptr;
        call(269, static_cast<const OrtShapeInferContext*>(context), name, &attribute);
        int64_t value = 0;
        size_t size = 0;
        call(272, attribute, INTEGER, static_cast<void*>(&value), sizeof value, &size);
        return value;
    }
    // Nothing is said of a shape with an axis that has neither a size nor a name.
    void set_output_shape(OrtShapeInferContext* context, size_t place, int element, const std::vector<int64_t>& shape,
                          const std::vector<const char*>& names) const {
        for (size_t axis = 0; axis < shape.size(); ++axis) {
            if (shape[axis] < 0 && !*names[axis]) return;
        }
        OrtShapeInfo* info = nullptr;
        call(57, &info);
        const Owned owned{*this, info};
        call(58, info, element);
        call(59, info, shape.data(), shape.size());
        call(271, info, const_cast<const char**>(names.data()), names.size());
        call(270, context, place, static_cast<const OrtShapeInfo*>(info));
    }

    bool integer(const OrtKernelInfo* info, const char* name, int64_t* into) const {
        OrtStatus* failed = at<OrtStatus* (*)(const OrtKernelInfo*, const char*, int64_t*)>(86)(info, name, into);
        if (failed) release(failed);
        return !failed;
    }
    bool number(const OrtKernelInfo* info, const char* name, float* into) const {
        OrtStatus* failed = at<OrtStatus* (*)(const OrtKernelInfo*, const char*, float*)>(85)(info, name, into);
        if (failed) release(failed);
        return !failed;
    }
    // "" where the attribute is left out.
    std::string string(const OrtKernelInfo* info, const char* name) const {
        const auto get = at<OrtStatus* (*)(const OrtKernelInfo*, const char*, char*, size_t*)>(87);
        size_t size = 0;
        if (OrtStatus* failed = get(info, name, nullptr, &size)) return release(failed), "";
        std::string value(size, '\0');
        call(87, info, name, &value[0], &size);
        return value.c_str();  // up to the zero that ends it
    }
    size_t outputs(const OrtKernelInfo* info) const {
        size_t count = 0;
        call(231, info, &count);
        return count;
    }
    size_t inputs(const OrtKernelInfo* info) const {
        size_t count = 0;
        call(230, info, &count);
        return count;
    }
    std::string input_name(const OrtKernelInfo* info, size_t place) const {
        size_t size = 0;
        call(232, info, place, static_cast<char*>(nullptr), &size);
        std::string name(size, '\0');
        call(232, info, place, &name[0], &size);
        return name.c_str();  // up to the zero that ends it
    }
    std::string node_name(const OrtKernelInfo* info) const {
        size_t size = 0;
        call(244, info, static_cast<char*>(nullptr), &size);
        std::string name(size, '\0');
        call(244, info, &name[0], &size);
        return name.c_str();
    }
    // Null where input `place` is not a constant.
    const OrtValue* constant(const OrtKernelInfo* info, size_t place) const {
        int is_constant = 0;
        const OrtValue* value = nullptr;
        call(249, info, place, &is_constant, &value);
        return is_constant ? value : nullptr;
    }

    const OrtValue* input(const OrtKernelContext* context, size_t place) const {
        const OrtValue* value = nullptr;
        call(90, context, place, &value);
        return value;
    }
    void* output(OrtKernelContext* context, size_t place, const int64_t* shape, size_t rank) const {
        OrtValue* value = nullptr;
        call(91, context, place, shape, rank, &value);
        return const_cast<void*>(data(value));
    }
    // Run `work(user, i)` for every i below `total` on the session's own threads, in contiguous ranges.
    void parallel(const OrtKernelContext* context, void (*work)(void*, size_t), size_t total, void* user) const {
        call(274, context, work, total, size_t(0), user);
    }

  private:
    struct Owned {
        const Api& api;
        OrtShapeInfo* info;
        ~Owned() { api.release(info); }
    };

    template <class Function>
    Function at(size_t place) const {
        return reinterpret_cast<Function>(table[place]);
    }
    template <class... Arguments>
    void call(size_t place, Arguments... arguments) const {
        if (OrtStatus* failed = at<OrtStatus* (*)(Arguments...)>(place)(arguments...)) throw Failed{failed};
    }

    void* const* table;
};

// The status of doing `action`: null where it succeeded.
template <class Action>
OrtStatus* guarded(const Api& api, const Action& action) noexcept {
    constexpr int FAIL = 1, INVALID_ARGUMENT = 2;
    try {
        action();
        return nullptr;
    } catch (const Failed& failed) {
        return failed.status;
    } catch (const Refused& refused) {
        return api.status(INVALID_ARGUMENT, refused.what());
    } catch (const std::bad_alloc&) {
        return api.status(FAIL, "tokopt.cpu: out of memory.");
    } catch (const std::exception& error) {
        return api.status(FAIL, error.what());
    } catch (...) {
        return api.status(FAIL, "tokopt.cpu: an unknown error.");
    }
}

}  // namespace tokopt
