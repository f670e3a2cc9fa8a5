// What the shared library exports: the registration of its ops with ONNX Runtime, and what Python asks it.
#include <atomic>
#include <mutex>
#include <string>

#include "isa.h"
#include "ops.h"
#include "ort.h"

namespace {

std::atomic<void* const*> table{nullptr};

// One domain for each instruction set; sessions refer to it as long as they live, so it is never released.
OrtCustomOpDomain* domain(const tokopt::Api& api, tokopt::Isa isa) {
    static std::mutex mutex;
    static OrtCustomOpDomain* domains[tokopt::ISAS];
    const std::lock_guard<std::mutex> lock(mutex);
    OrtCustomOpDomain*& own = domains[static_cast<int>(isa)];
    if (!own) {
        OrtCustomOpDomain* made = api.create_domain("tokopt.cpu");
        api.add(made, tokopt::quantized_linear(isa));
        api.add(made, tokopt::expert_linear(isa));
        api.add(made, tokopt::float_expert_linear(isa));
        for (bool codes : {false, true}) api.add(made, tokopt::cached_attention(isa, codes));
        api.add(made, tokopt::int8_linear(isa));
        api.add(made, tokopt::draw_tokens(isa));
        api.add(made, tokopt::uniforms());
        api.add(made, tokopt::move_entries());
        api.add(made, tokopt::latest_repeat());
        own = made;
    }
    return own;
}

}  // namespace

void* const* tokopt::registered() { return table; }

#define EXPORTED extern "C" __attribute__((visibility("default")))

EXPORTED OrtStatus* RegisterCustomOps(OrtSessionOptions* options, const OrtApiBase* base) {
    void* const* offered = base->GetApi(tokopt::ORT_VERSION);
    if (!offered) {
        const tokopt::Api oldest(base->GetApi(1));
        return oldest.status(1, "tokopt.cpu: needs ONNX Runtime 1.22 or newer; update it.");
    }
    table = offered;
    const tokopt::Api api(offered);
    return tokopt::guarded(api, [&] { api.add(options, domain(api, tokopt::chosen())); });
}

// The version of the ops: what the manifest of an artifact names.
EXPORTED int tokopt_cpu_version() { return tokopt::VERSION; }

// The instruction sets that this processor has, separated by commas, fastest first.
EXPORTED const char* tokopt_cpu_isas() {
    static const std::string& names = *[] {
        auto* joined = new std::string;
        for (tokopt::Isa isa : tokopt::available())
            *joined += (joined->empty() ? "" : ",") + std::string(tokopt::name(isa));
        return joined;
    }();
    return names.c_str();
}

// Bytes of packed weights that this process holds now.
EXPORTED size_t tokopt_cpu_packed_bytes() { return tokopt::packed_bytes(); }
